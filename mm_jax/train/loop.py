"""The life of a run: stages in order, each a loop of steps that logs, saves, stops and resumes."""

import contextlib
import dataclasses
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mm_jax.checkpoint.run import Saved, StageCheckpoints, latest
from mm_jax.data.pipeline import Layout, TrainData, merge
from mm_jax.data.sources import SourceConfig, open_source
from mm_jax.errors import UserError
from mm_jax.parallel import processes
from mm_jax.parallel.rules import put_batch, rows_of_process
from mm_jax.train import losses, metrics, partition, plots, preference
from mm_jax.train.config import RunConfig, Stage
from mm_jax.train.encode import Encode
from mm_jax.train.goodput import Goodput
from mm_jax.train.optimizer import schedule, tree_bytes
from mm_jax.train.plan import plan_stage, shardings_of
from mm_jax.train.profile import Profiler
from mm_jax.train.setup import Setup, enable_compilation_cache, prepare
from mm_jax.train.signals import StopSignals
from mm_jax.train.skipped import Skipped
from mm_jax.train.start import first_params
from mm_jax.train.state import Usual
from mm_jax.train.step import make_step


def train(config: RunConfig, run_dir: str | Path, profile: tuple[int, int] | None = None) -> bool:
    """Runs or goes on with the stages of `config` in `run_dir`; True when all are done, False when stopped.

    `profile`: first and last step to trace, counted from 1 in this process; of several processes the first one traces.

    Raises:
        UserError: anything wrong with config, data, directory or disk.
    """
    enable_compilation_cache()
    run_dir, now = Path(run_dir), time.time()
    setup = prepare(config, run_dir)
    names = list(config.stages)
    found = processes.agree(latest(run_dir, names))
    began = next((line["began"] for line in metrics.read_metrics(run_dir) if "began" in line), now)
    goodput = Goodput(processes.agree(began))
    first, done = found or (names[0], 0)
    params = None
    if not found:
        plan = plan_stage(setup.config, setup.model_config, setup.config.stages[names[0]])
        params = first_params(setup.config, setup.model_config, plan.params)
    profiler = Profiler(profile if processes.is_first() else None, run_dir / "profile")
    with StopSignals() as stop, contextlib.closing(profiler):
        for name in names[names.index(first) :]:
            start = done if name == first else 0
            params = _StageRun(setup, name, params, start, profiler, goodput).run(stop)
            if stop.requested:
                break
    if processes.is_first():
        plots.loss_curves(run_dir)
    return not stop.requested


class _StageRun:
    """One stage, from its first step or from the checkpoint at `start`."""

    def __init__(
        self,
        setup: Setup,
        name: str,
        params: dict[str, Any] | None,
        start: int,
        profiler: Profiler,
        goodput: Goodput,
    ):
        self.setup, self.name, self.start, self.profiler, self.goodput = setup, name, start, profiler, goodput
        self.config, self.stage = setup.config, setup.config.stages[name]
        keep = self.config.checkpoint
        self.checkpoints = StageCheckpoints(setup.run_dir, name, keep.keep_last, keep.keep_best)
        self.plan = plan_stage(self.config, setup.model_config, self.stage)
        self.setup = setup = dataclasses.replace(setup, execution=self.plan.execution)
        saved, skipped = None, 0
        if params is None:
            saved = self._restore()
            params, meta = saved.params, saved.meta
            key = jax.random.wrap_key_data(np.asarray(meta["key"], np.uint32))
            loss, norm, count = meta["usual"]
            usual = Usual(np.float32(loss), np.float32(norm), np.int32(count))
            self.state, self.frozen = self.plan.begin(params, key, saved.opt_state, meta["updates"], usual)
            skipped, goodput.productive = meta["skipped"], meta["productive_seconds"]
        else:
            params = jax.device_put(params, self.plan.params)
            key = jax.random.fold_in(jax.random.key(self.config.seed), list(self.config.stages).index(name))
            self.state, self.frozen = self.plan.begin(params, key)
        sources, mixture, self.reference = setup.sources, self.stage.mixture, None
        if self.stage.loss == "preference":
            found = preference.pairs(setup, name, params)
            sources = {"preferences": open_source("preferences", SourceConfig("chat", str(found.path)))}
            mixture, self.reference = {"preferences": 1.0}, found.reference
        self.sources = tuple(sorted(mixture))
        encode = Encode.of(setup.processor, self.stage)
        self.part = rows_of_process(self.plan.mesh, self.plan.rules, self.stage.batch.rows)
        self.data = TrainData(
            {name: sources[name] for name in mixture}, mixture, self.stage.batch,
            encode,
            Layout.of(
                encode.processor, targets=encode.targets, names=encode.names, two_way=self.config.model.two_way
            ),
            seed=self.config.seed * 1000 + list(self.config.stages).index(name), workers=self.config.workers,
            process=self.part, strict=self.config.strict,
        )  # fmt: skip
        if saved is not None:
            self.data.restore(saved.data)
        shardings, _ = shardings_of(self.plan.abstract_state())
        self.step = make_step(
            setup.apply, stage_loss(self.stage, self.sources), self.plan.transform,
            schedule(self.stage.optimizer, self.stage.steps), self.stage.batch.accumulate, shardings,
            self.config.skip.spike,
        )  # fmt: skip
        self.skipped = Skipped(
            setup.run_dir, name, list(self.config.stages), start, self.config.skip.limit, skipped
        )
        self.writes = processes.is_first()
        self.pending: list[tuple[int, dict[str, jax.Array], tuple[str, ...]]] = []  # (step, metrics, samples)
        self.trainable: Counter[str] = Counter()  # answer tokens by source since the last log line
        self.told: set[tuple[str, str]] = set()  # (source, reason) of the drops that were shown
        self.since_save: list[tuple[float, int]] = []
        self.counts, self.clock = metrics.Counts(), time.perf_counter()
        self.saved_at, self.due = time.monotonic(), False

    def run(self, stop: StopSignals) -> dict[str, Any]:
        """Steps until the stage is done or a stop is asked for; returns the params."""
        offsets, total = {}, 0
        for name, stage in self.config.stages.items():
            offsets[name], total = total, total + stage.steps
        self.writer = None
        if self.writes:
            self.writer = metrics.MetricsWriter(self.setup.run_dir, offsets, self.name, self.start)
        show_bar = self.writes and sys.stderr.isatty()
        self.bar = tqdm(total=self.stage.steps, initial=self.start, desc=self.name, disable=not show_bar)
        try:
            self.data.start()  # samples are read while the step compiles
            self._describe()
            for done in range(self.start + 1, self.stage.steps + 1):
                self._one_step(done)
                last = done == self.stage.steps
                if last or done % self.config.log_every == 0:
                    self._log(done)
                stopping = stop.reached(offsets[self.name] + done)
                if last or stopping or self.due or done % self.config.checkpoint.every_steps == 0:
                    with self.goodput.lost():
                        self._save(done)
                if stopping:
                    break
            self.goodput.measure()
            self.goodput.stop()
            self.checkpoints.wait()
        finally:
            self.data.close()
            if self.writer is not None:
                self.writer.close()
            self.bar.close()
            self.checkpoints.close()
        return self._params()

    def _one_step(self, done: int) -> None:
        with self.goodput.lost():
            batch, info = next(self.data)
        self.counts.add(batch)
        self.trainable.update(info.trainable)
        if self.reference is not None:
            batch = {**batch, "reference": preference.look_up(self.reference, batch["preference"])}
        self.profiler.before_step()
        mesh, rules, accumulate = self.plan.mesh, self.plan.rules, self.stage.batch.accumulate
        arrays = put_batch(batch, mesh, rules, accumulate, self.part[1])
        self.state, found = self.step(self.state, self.frozen, arrays)
        self.pending.append((done, found, info.samples))
        self.bar.update()
        if done == self.start + 1 and done < self.stage.steps:
            # Compilation is no part of the speeds: the clock starts after the first step.
            jax.block_until_ready(found)
            self.counts, self.clock = metrics.Counts(), time.perf_counter()
            self.goodput.go()

    def _collect(self) -> dict[str, float]:
        """Fetches the metrics of the steps since the last time; the only wait for the device.

        Those of updates that were not done are left out.
        """
        steps, found, samples = zip(*self.pending, strict=True)
        good = self.skipped.sort_out(list(zip(steps, jax.device_get(found), samples, strict=True)))
        self.pending = []
        values = metrics.average(good) if good else {}
        if good:
            self.since_save.append((values["loss"], len(good)))
        return values | {"skipped": self.skipped.total}

    def _log(self, done: int) -> None:
        if not self.pending:
            return
        values = self._collect()
        seconds = time.perf_counter() - self.clock
        everyone = self._gather()
        counts, trainable = metrics.Counts(), Counter()
        for one in everyone:
            counts.join(one["counts"])
            trainable.update(one["trainable"])
        if counts.slots:
            parts = sorted(self.state.trainable)
            dense = self.stage.loss == "dense"
            values |= metrics.rates(counts, seconds, self.setup.model_config, parts, dense)
        values["compilations"] = self.step._cache_size()
        values["dropped"] = sum(one["dropped"] for one in everyone)
        values["goodput"] = self.goodput.measure()
        values |= {f"trainable_tokens/{name}": count for name, count in trainable.items() if count}
        self.trainable.clear()
        self.counts, self.clock = metrics.Counts(), time.perf_counter()
        if self.writer is not None:
            self.writer.write(self.name, done, values)
            self._tell(done, values, [tuple(drop) for one in everyone for drop in one["messages"]])

    def _gather(self) -> list[dict[str, Any]]:
        """What each process that reads other samples has counted; the first one's clock decides when to save."""
        minutes, messages = self.config.checkpoint.every_minutes, self.data.drop_messages
        mine = {
            "part": self.part[0],
            "counts": dataclasses.asdict(self.counts),
            "trainable": dict(self.trainable),
            "dropped": sum(sum(reasons.values()) for reasons in self.data.drops.values()),
            "messages": [(*key, text) for key, text in messages.items() if key not in self.told],
            "due": bool(minutes and time.monotonic() - self.saved_at >= 60 * minutes),
        }
        self.told |= messages.keys()
        everyone = processes.gather(mine)
        self.due = everyone[0]["due"]
        return list({one["part"]: one for one in everyone}.values())

    def _tell(self, done: int, values: dict[str, float], drops: list[tuple[str, str, str]]) -> None:
        """The line of a log on the terminal, and once for each source and reason why samples are left out."""
        loss = values.get("loss", np.nan)
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if self.bar.disable:
            text = f"{self.name} {done}/{self.stage.steps}  loss {loss:.4f}"
            if "mfu" in values:
                speeds = "  {samples_per_second:.0f} samples/s  padding {padding:.1%}  mfu {mfu:.0%}"
                speeds += "  goodput {goodput:.0%}"
                text += speeds.format(**values)
            print(text, file=sys.stderr, flush=True)
        for _, reason, message in drops:
            tqdm.write(f"{self.name}: left out ({reason}): {message}", file=sys.stderr)

    def _save(self, done: int) -> None:
        self._log(done)
        self.saved_at, self.due = time.monotonic(), False
        if not self.skipped.finite:  # parameters that may be spoilt take no place among the checkpoints
            if done == self.stage.steps:
                raise UserError(
                    f'the loss of stage "{self.name}" is not finite near step {done}: lower its '
                    f"optimizer.learning_rate (now {self.stage.optimizer.learning_rate}); earlier checkpoints are "
                    f"intact, and the samples are in {self.skipped.path}"
                )
            return
        loss = np.inf  # of a checkpoint that is not among the best
        if self.since_save:
            values, steps = np.transpose(self.since_save)
            loss = np.average(values, weights=steps)
        self.since_save = []
        state = self.state
        meta = {
            "stage": self.name,
            "step": done,
            "key": np.asarray(jax.random.key_data(state.key)).tolist(),
            "updates": int(state.step),
            "usual": [
                np.asarray(x).item() for x in (state.usual.loss, state.usual.grad_norm, state.usual.count)
            ],
            "skipped": self.skipped.total,
            "productive_seconds": self.goodput.productive,
        }
        data = merge(processes.gather(self.data.state()))
        self.checkpoints.save(done, self._params(), state.opt_state, data, meta, float(loss))

    def _params(self) -> dict[str, Any]:
        return partition.join(self.state.trainable, self.frozen)

    def _restore(self) -> Saved:
        """The checkpoint at `start`."""
        state, frozen = self.plan.abstract_state()
        return self.checkpoints.restore(self.start, partition.join(state.trainable, frozen), state.opt_state)

    def _describe(self) -> None:
        """One line about what moves and what it costs."""
        counts = {
            name: sum(x.size for x in jax.tree.leaves(tree))
            for name, tree in (("trainable", self.state.trainable), ("frozen", self.frozen))
        }
        size = tree_bytes(self.state.opt_state)
        if not self.writes:
            return
        if self.start == 0:
            values = {"trainable_parameters": counts["trainable"], "frozen_parameters": counts["frozen"]}
            values |= {"optimizer_bytes": size, "began": self.goodput.began}
            self.writer.write(self.name, 0, values)
        if self.bar.disable:
            print(
                f"{self.name}: {self.stage.steps} steps from {self.start}, "
                f"{counts['trainable']:,} parameters train, {counts['frozen']:,} are frozen, "
                f"optimizer state {size / 1e6:.1f} MB",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def stage_loss(stage: Stage, sources: tuple[str, ...]) -> losses.Loss:
    """The loss that a stage names."""
    if stage.loss == "dense":
        return losses.dense(stage.positive_weight)
    if stage.loss == "preference":
        return losses.preference(stage.beta)
    return losses.next_token(sources, stage.naming, stage.chunk)
