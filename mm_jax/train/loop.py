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

from mm_jax.checkpoint.run import StageCheckpoints, latest
from mm_jax.data.pipeline import Layout, TrainData
from mm_jax.data.sources import SourceConfig, open_source
from mm_jax.errors import UserError
from mm_jax.parallel.rules import put_batch
from mm_jax.train import losses, metrics, partition, plots, preference
from mm_jax.train.config import RunConfig, Stage
from mm_jax.train.encode import Encode
from mm_jax.train.optimizer import schedule, tree_bytes
from mm_jax.train.plan import plan_stage, shardings_of
from mm_jax.train.profile import Profiler
from mm_jax.train.setup import Setup, enable_compilation_cache, prepare
from mm_jax.train.signals import StopSignals
from mm_jax.train.start import first_params
from mm_jax.train.state import TrainState
from mm_jax.train.step import make_step


def train(config: RunConfig, run_dir: str | Path, profile: tuple[int, int] | None = None) -> bool:
    """Runs or goes on with the stages of `config` in `run_dir`; True when all are done, False when stopped.

    `profile`: first and last step to trace, counted from 1 in this process.

    Raises:
        UserError: anything wrong with config, data, directory or disk.
    """
    enable_compilation_cache()
    run_dir = Path(run_dir)
    setup = prepare(config, run_dir)
    names = list(config.stages)
    found = latest(run_dir, names)
    first, done = found or (names[0], 0)
    params = None
    if not found:
        plan = plan_stage(setup.config, setup.model_config, setup.config.stages[names[0]])
        params = first_params(setup.config, setup.model_config, plan.params)
    profiler = Profiler(profile, run_dir / "profile")
    with StopSignals() as stop, contextlib.closing(profiler):
        for name in names[names.index(first) :]:
            start = done if name == first else 0
            params = _StageRun(setup, name, params, start, profiler).run(stop)
            if stop.requested:
                break
    plots.loss_curves(run_dir)
    return not stop.requested


class _StageRun:
    """One stage, from its first step or from the checkpoint at `start`."""

    def __init__(
        self, setup: Setup, name: str, params: dict[str, Any] | None, start: int, profiler: Profiler
    ):
        self.setup, self.name, self.start, self.profiler = setup, name, start, profiler
        self.config, self.stage = setup.config, setup.config.stages[name]
        keep = self.config.checkpoint
        self.checkpoints = StageCheckpoints(setup.run_dir, name, keep.keep_last, keep.keep_best)
        self.plan = plan_stage(self.config, setup.model_config, self.stage)
        self.setup = setup = dataclasses.replace(setup, execution=self.plan.execution)
        saved_data = None
        if params is None:
            params, opt_state, saved_data, key = self._restore()
        else:
            params = jax.device_put(params, self.plan.params)
            key = jax.random.fold_in(jax.random.key(self.config.seed), list(self.config.stages).index(name))
            opt_state = None
        sources, mixture, self.reference = setup.sources, self.stage.mixture, None
        if self.stage.loss == "preference":
            found = preference.pairs(setup, name, params)
            sources = {"preferences": open_source("preferences", SourceConfig("chat", str(found.path)))}
            mixture, self.reference = {"preferences": 1.0}, found.reference
        self.sources = tuple(sorted(mixture))
        trainable, self.frozen = partition.split(params, self.stage.trainable)
        shardings, _ = shardings_of(self.plan.abstract_state())
        if opt_state is None:
            opt_state = jax.jit(self.plan.transform.init, out_shardings=shardings.opt_state)(trainable)
        step, key = jax.device_put((np.int32(start), key), (shardings.step, shardings.key))
        self.state = TrainState(step, trainable, opt_state, key)
        encode = Encode.of(setup.processor, self.stage)
        self.data = TrainData(
            {name: sources[name] for name in mixture}, mixture, self.stage.batch,
            encode,
            Layout.of(
                encode.processor, targets=encode.targets, names=encode.names, two_way=self.config.model.two_way
            ),
            seed=self.config.seed * 1000 + list(self.config.stages).index(name), workers=self.config.workers,
            process=(jax.process_index(), jax.process_count()), strict=self.config.strict,
        )  # fmt: skip
        if saved_data is not None:
            self.data.restore(saved_data)
        loss = stage_loss(self.stage, self.sources)
        rates = schedule(self.stage.optimizer, self.stage.steps)
        self.step = make_step(
            setup.apply, loss, self.plan.transform, rates, self.stage.batch.accumulate, shardings
        )
        self.pending: list[dict[str, jax.Array]] = []
        self.trainable: Counter[str] = Counter()  # answer tokens by source since the last log line
        self.told: set[tuple[str, str]] = set()  # (source, reason) of the drops that were shown
        self.since_save: list[tuple[float, int]] = []
        self.counts, self.clock = metrics.Counts(), time.perf_counter()

    def run(self, stop: StopSignals) -> dict[str, Any]:
        """Steps until the stage is done or a stop is asked for; returns the params."""
        offsets, total = {}, 0
        for name, stage in self.config.stages.items():
            offsets[name], total = total, total + stage.steps
        self.writer = metrics.MetricsWriter(self.setup.run_dir, offsets, self.name, self.start)
        show_bar = sys.stderr.isatty()
        self.bar = tqdm(total=self.stage.steps, initial=self.start, desc=self.name, disable=not show_bar)
        try:
            self.data.start()  # samples are read while the step compiles
            self._describe()
            for done in range(self.start + 1, self.stage.steps + 1):
                self._one_step(done)
                last = done == self.stage.steps
                if last or done % self.config.log_every == 0:
                    self._log(done)
                if last or stop.requested or done % self.config.checkpoint.every_steps == 0:
                    self._save(done)
                if stop.requested:
                    break
            self.checkpoints.wait()
        finally:
            self.data.close()
            self.writer.close()
            self.bar.close()
            self.checkpoints.close()
        return self._params()

    def _one_step(self, done: int) -> None:
        batch, info = next(self.data)
        self.counts.add(batch)
        self.trainable.update(info.trainable)
        if self.reference is not None:
            batch = {**batch, "reference": preference.look_up(self.reference, batch["preference"])}
        self.profiler.before_step()
        arrays = put_batch(batch, self.plan.mesh, self.plan.rules, self.stage.batch.accumulate)
        self.state, found = self.step(self.state, self.frozen, arrays)
        self.pending.append(found)
        self.bar.update()
        if done == self.start + 1 and done < self.stage.steps:
            # Compilation is no part of the speeds: the clock starts after the first step.
            jax.block_until_ready(found)
            self.counts, self.clock = metrics.Counts(), time.perf_counter()

    def _collect(self, done: int) -> dict[str, float]:
        """Fetches the metrics of the steps since the last time; the only wait for the device."""
        values = metrics.average(jax.device_get(self.pending))
        if not np.isfinite(values["loss"]) or not np.isfinite(values["grad_norm"]):
            raise UserError(
                f'the loss of stage "{self.name}" is not finite near step {done}: lower its '
                "optimizer.learning_rate (now "
                f"{self.stage.optimizer.learning_rate}); earlier checkpoints are intact"
            )
        self.since_save.append((values["loss"], len(self.pending)))
        self.pending = []
        return values

    def _log(self, done: int) -> None:
        if not self.pending:
            return
        values = self._collect(done)
        seconds = time.perf_counter() - self.clock
        if self.counts.slots:
            parts = sorted(self.state.trainable)
            dense = self.stage.loss == "dense"
            values |= metrics.rates(self.counts, seconds, self.setup.model_config, parts, dense)
        values["compilations"] = self.step._cache_size()
        values["dropped"] = sum(sum(reasons.values()) for reasons in self.data.drops.values())
        values |= {f"trainable_tokens/{name}": count for name, count in self.trainable.items() if count}
        self.trainable.clear()
        self.writer.write(self.name, done, values)
        self.counts, self.clock = metrics.Counts(), time.perf_counter()
        self.bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        if self.bar.disable:
            text = f"{self.name} {done}/{self.stage.steps}  loss {values['loss']:.4f}"
            if "mfu" in values:
                speeds = "  {samples_per_second:.0f} samples/s  padding {padding:.1%}  mfu {mfu:.0%}"
                text += speeds.format(**values)
            print(text, file=sys.stderr, flush=True)
        self._tell_drops()

    def _tell_drops(self) -> None:
        """Says once for each source and reason why samples are left out."""
        for key, message in self.data.drop_messages.items():
            if key not in self.told:
                self.told.add(key)
                tqdm.write(f"{self.name}: left out ({key[1]}): {message}", file=sys.stderr)

    def _save(self, done: int) -> None:
        self._log(done)
        values, steps = np.transpose(self.since_save)
        loss = np.average(values, weights=steps)
        self.since_save = []
        key = np.asarray(jax.random.key_data(self.state.key)).tolist()
        meta = {"stage": self.name, "step": done, "key": key}
        opt_state, data = self.state.opt_state, self.data.state()
        self.checkpoints.save(done, self._params(), opt_state, data, meta, float(loss))

    def _params(self) -> dict[str, Any]:
        return partition.join(self.state.trainable, self.frozen)

    def _restore(self) -> tuple[dict[str, Any], Any, dict[str, Any] | None, jax.Array]:
        """(params, opt_state, data state, key) of the checkpoint at `start`."""
        state, frozen = self.plan.abstract_state()
        params = partition.join(state.trainable, frozen)
        saved = self.checkpoints.restore(self.start, params, state.opt_state)
        key = jax.random.wrap_key_data(np.asarray(saved.meta["key"], np.uint32))
        return saved.params, saved.opt_state, saved.data, key

    def _describe(self) -> None:
        """One line about what moves and what it costs."""
        counts = {
            name: sum(x.size for x in jax.tree.leaves(tree))
            for name, tree in (("trainable", self.state.trainable), ("frozen", self.frozen))
        }
        size = tree_bytes(self.state.opt_state)
        if self.start == 0:
            values = {"trainable_parameters": counts["trainable"], "frozen_parameters": counts["frozen"]}
            self.writer.write(self.name, 0, {**values, "optimizer_bytes": size})
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
