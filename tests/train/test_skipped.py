"""Updates that are skipped: what counts as a spike, what stays as it was, and what is written down."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.checkpoint.run import latest
from mm_jax.errors import UserError
from mm_jax.train import loop
from mm_jax.train.config import load_config
from mm_jax.train.metrics import read_metrics
from mm_jax.train.state import Usual
from mm_jax.train.step import SETTLED, judge
from tests.train.test_step import batch, start


def after(values: list[tuple[float, float]], spike: float = 10.0) -> tuple[list[bool], Usual]:
    """What `judge` says to (loss, gradient norm) one after another."""
    said, usual, one = [], Usual(), jax.jit(judge, static_argnums=3)
    for loss, norm in values:
        good, usual = one(usual, jnp.float32(loss), jnp.float32(norm), spike)
        said.append(bool(good))
    return said, usual


def test_a_spike_is_known_by_the_running_averages() -> None:
    calm = [(2.0, 1.0)] * SETTLED
    said, usual = after(calm)
    assert all(said) and float(usual.loss) == pytest.approx(2) and int(usual.count) == SETTLED
    for loss, norm, good in ((19.9, 1, True), (20.1, 1, False), (2, 9.9, True), (2, 10.1, False)):
        assert after([*calm, (loss, norm)])[0][-1] == good, (loss, norm)
    assert after([*calm, (1e9, 1)], spike=0.0)[0][-1]  # off
    assert after([*calm[1:], (1e9, 1)])[0][-1]  # one step too few to know


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_skipped_at_once_and_moves_no_average(bad: float) -> None:
    for value in ((bad, 1.0), (2.0, bad)):
        said, usual = after([(2.0, 1.0), value, (2.0, 1.0)], spike=0.0)
        assert said == [True, False, True]
        assert (float(usual.loss), float(usual.grad_norm), int(usual.count)) == (2, 1, 2)


def test_a_lasting_change_of_level_becomes_usual() -> None:
    said, _ = after([(2.0, 1.0)] * SETTLED + [(2.0, 50.0)] * 30)
    skipped = said.count(False)
    assert 5 < skipped < 20 and said[-1]


def test_a_skipped_step_changes_nothing() -> None:
    """A batch that is not finite in the middle: the state afterwards is that of a run that never saw it."""
    bad = batch(2, 1)
    bad["loss_weights"] = np.full_like(bad["loss_weights"], np.nan)
    results = []
    for batches in ((batch(2, 0), bad, batch(2, 2)), (batch(2, 0), batch(2, 2))):
        step, state, frozen = start(("decoder", "audio"))
        skipped = []
        for arrays in batches:
            state, metrics = step(state, frozen, arrays)
            skipped.append(float(metrics["skipped"][0]))
        results.append((state, skipped))
    (one, skipped), (two, _) = results
    assert skipped == [0, 1, 0]
    jax.tree.map(
        np.testing.assert_array_equal,
        (one.step, one.trainable, one.opt_state, jax.random.key_data(one.key), one.usual),
        (two.step, two.trainable, two.opt_state, jax.random.key_data(two.key), two.usual),
    )


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[str, ...]]:
    """Batches of stage "language" at the steps that are keys get loss weights that are no numbers; their samples."""
    samples: dict[int, tuple[str, ...]] = {}
    one_step, put = loop._StageRun._one_step, loop.put_batch

    def step(self: loop._StageRun, done: int) -> None:
        step.now = done if self.name == "language" else 0
        one_step(self, done)
        if step.now in samples:
            samples[step.now] = self.pending[-1][2]

    def put_batch(arrays: dict, *more: object) -> dict:
        if step.now in samples:
            arrays = {**arrays, "loss_weights": arrays["loss_weights"] * np.nan}
        return put(arrays, *more)

    monkeypatch.setattr(loop._StageRun, "_one_step", step)
    monkeypatch.setattr(loop, "put_batch", put_batch)
    return samples


ONLY = ("--stages.towers.steps", "1", "--stages.align.steps", "1", "--stages.prefer.steps", "1")


def test_samples_of_skipped_updates_are_written_down(
    config_path: Path, tmp_path: Path, poisoned: dict[int, tuple[str, ...]]
) -> None:
    poisoned |= {2: (), 3: ()}
    saves = ("--checkpoint.every-steps", "1000", "--checkpoint.every-minutes", "1e-9")
    assert loop.train(load_config(config_path, [*ONLY, *saves]), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [(x["stage"], x["step"], x["reason"], x["loss"]) for x in lines] == [
        ("language", 2, "not finite", None),
        ("language", 3, "not finite", None),
    ]
    for line in lines:
        assert line["samples"] == list(dict.fromkeys(poisoned[line["step"]]))
        assert all(name.startswith(("pictures/pictures-", "sounds/sounds-")) for name in line["samples"])
    logged = [x for x in read_metrics(tmp_path / "run") if x["stage"] == "language" and x["step"]]
    assert [x["skipped"] for x in logged] == [0, 1, 2, 2]
    assert [np.isfinite(x.get("loss", np.nan)) for x in logged] == [True, False, False, True]
    # so little time ago is the last save at every step, but there is none behind a step that was not finite
    saved = (tmp_path / "run" / "checkpoints" / "language").iterdir()
    assert sorted(p.name for p in saved if p.name.isdigit()) == ["1", "4"]


def test_too_many_in_a_row_stop_the_run(
    config_path: Path, tmp_path: Path, poisoned: dict[int, tuple[str, ...]]
) -> None:
    poisoned |= {3: (), 4: ()}
    with pytest.raises(UserError) as caught:
        loop.train(load_config(config_path, [*ONLY, "--skip.limit", "2"]), tmp_path / "run")
    message = str(caught.value)
    assert (
        "2 updates in a row up to step 4 were skipped (not finite)" in message and "skipped.jsonl" in message
    )
    assert latest(tmp_path / "run", ["towers", "language"]) == ("language", 2)
    poisoned.clear()  # the data were mended: lines of steps that are done again are gone
    assert loop.train(load_config(config_path, [*ONLY, "--skip.limit", "2"]), tmp_path / "run")
    assert (tmp_path / "run" / "skipped.jsonl").read_text() == ""
