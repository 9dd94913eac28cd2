"""Whole runs in miniature: every stage, freezing, stopping and going on bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mm_jax.checkpoint.run import latest, load_params
from mm_jax.errors import UserError
from mm_jax.train import loop
from mm_jax.train.config import load_config
from mm_jax.train.metrics import read_metrics
from mm_jax.train.setup import check_model, complete_model, init_params, read_run

STAGES = ("towers", "language", "align", "prefer")


@pytest.fixture(scope="module")
def finished(config_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert loop.train(load_config(config_path), run_dir)
    return run_dir


def flat(params: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}


def losses(run_dir: Path) -> list[tuple]:
    return [(x["stage"], x["step"], x["loss"], x["grad_norm"]) for x in read_metrics(run_dir) if "loss" in x]


def assert_same_run(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    for stage in STAGES:
        a, b = flat(load_params(one, stage)), flat(load_params(two, stage))
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"{stage}: {name}")


def test_the_run_directory(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} >= {
        "config.json", "processor", "checkpoints", "metrics.jsonl", "tensorboard", "loss.png", "preferences",
    }  # fmt: skip
    lines = [x for x in read_metrics(finished) if "loss" in x]
    assert [(x["stage"], x["step"]) for x in lines] == [(s, i) for s in STAGES for i in range(1, 5)]
    assert all(x["compilations"] == 1 for x in lines)
    last = [x for x in lines if x["stage"] == "align"][-1]
    assert {
        "loss/pictures",
        "loss/sounds",
        "tokens_per_second",
        "samples_per_second",
        "padding",
        "mfu",
    } <= last.keys()
    assert 0 < last["padding"] < 1 and last["mfu"] > 0
    assert json.loads((finished / "config.json").read_text())["name"] == "tiny"


def test_a_stage_changes_what_it_names_and_nothing_else(config_path: Path, finished: Path) -> None:
    moves = {
        "towers": ("vision", "audio", "heads"),
        "language": ("decoder",),
        "align": ("image_projector", "audio_projector"),
        "prefer": ("image_projector", "audio_projector", "decoder"),
    }
    config, processor, _ = read_run(finished)
    before = flat(init_params(complete_model(load_config(config_path).model, processor), config.seed))
    sizes = {x["stage"]: x["optimizer_bytes"] for x in read_metrics(finished) if "optimizer_bytes" in x}
    for stage in STAGES:
        after = flat(load_params(finished, stage))
        changed = {name for name in after if not np.array_equal(before[name], after[name])}
        assert {name.split("/")[0] for name in changed} == set(moves[stage]), stage
        trained = sum(x.nbytes for name, x in after.items() if name.split("/")[0] in moves[stage])
        if stage == "align":  # Muon: one moment of the matrices, two of the rest
            assert trained < sizes[stage] < 2 * trained
        else:
            assert (
                sizes[stage] == 2 * trained + 8
            )  # two moments of what trains, two step counters, nothing else
        before = after


def test_preference_pairs_are_questions_with_a_right_and_a_wrong_answer(finished: Path) -> None:
    directory = finished / "preferences" / "prefer"
    pairs = [json.loads(line) for line in (directory / "preferences.jsonl").read_text().splitlines()]
    reference = np.load(directory / "reference.npy")
    assert len(pairs) == 10 and reference.shape == (10, 2)
    assert np.isfinite(reference).all() and (reference < 0).all()
    for pair in pairs:
        question, answer = pair["messages"]
        assert question["role"] == "user" and "is there a" in json.dumps(question)
        assert answer["content"] in ("yes", "no") and pair["rejected"] != answer["content"]
    first = next(x for x in read_metrics(finished) if x["stage"] == "prefer" and "loss" in x)
    # Before the first update policy and reference agree: the margin is 0 and the loss log 2.
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_stopped_in_every_stage_and_resumed_equals_uninterrupted(
    config_path: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_step, done = loop._StageRun._one_step, []

    def stop_now(self: loop._StageRun, step: int) -> None:
        one_step(self, step)
        done.append(self.name)
        if len(done) in stops:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop._StageRun, "_one_step", stop_now)
    # in the middle of towers, at the end of language, and in the middle of align and of prefer
    stops = (1, 8, 11, 14)
    config, run_dir = load_config(config_path), tmp_path / "run"
    for _ in stops:
        assert not loop.train(config, run_dir)
    assert loop.train(config, run_dir)
    assert len(done) == 16  # no step was done twice
    assert_same_run(finished, run_dir)
    assert loop.train(config, run_dir)  # a finished run has nothing left to do
    assert len(done) == 16


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    config_path: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    one_step = loop._StageRun._one_step

    def kill(self: loop._StageRun, step: int) -> None:
        if (self.name, step) == ("language", 4):
            raise Killed
        one_step(self, step)

    monkeypatch.setattr(loop._StageRun, "_one_step", kill)
    config, run_dir = load_config(config_path), tmp_path / "run"
    with pytest.raises(Killed):
        loop.train(config, run_dir)
    # What a kill in the middle of a save leaves behind, and a metrics line cut short.
    half = run_dir / "checkpoints" / "language" / "3.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "params").mkdir()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "langu')
    monkeypatch.undo()
    assert loop.train(config, run_dir)
    assert_same_run(finished, run_dir)


def test_sigterm_saves_and_exits_cleanly(config_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mm_jax", "train", str(config_path), "--run", str(tmp_path / "run")]
    command += ["--stages.towers.steps", "100000", "--checkpoint.every-steps", "1000000"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "run")) < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "Traceback" not in error
    assert f"go on with: python -m mm_jax train {config_path} --run {tmp_path / 'run'}" in out
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / "towers" / str(last)).is_dir()


def test_another_config_or_a_foreign_directory_is_refused(
    config_path: Path, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="another config: seed is 0 there and 1 here"):
        loop.train(load_config(config_path, ["--seed", "1"]), finished)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        loop.train(load_config(config_path), tmp_path)


def test_read_run_gives_a_working_model(finished: Path) -> None:
    config, processor, params = read_run(finished, "align")
    assert config.model.decoder.vocab_size == processor.vocab_size
    assert set(jax.tree.map(lambda x: x.dtype.name, flat(params)).values()) == {"float32"}
    with pytest.raises(UserError, match='has no stage "aline"; did you mean "align"'):
        read_run(finished, "aline")
    with pytest.raises(UserError, match="is not a run directory"):
        read_run(finished / "processor")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--processor.image.num-tokens", "5"],
            "processor.image.num_tokens is 5, but the model's image tokens is 2",
        ),
        (["--model.vision.width", "32"], "processor.image.width is 16, but model.vision.width is 32"),
        (
            ["--processor.audio.max-frames", "8"],
            "processor.audio.max_frames is 8, but model.audio.max_frames is 16",
        ),
        (["--processor.targets.audio-positions", "9"], "processor.targets.audio_positions is 9"),
    ],
)
def test_model_and_processor_must_fit(config_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_model(load_config(config_path, arguments))
    assert message in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(config_path: Path, tmp_path: Path) -> None:
    config = load_config(config_path, ["--stages.towers.optimizer.learning-rate", "1e30"])
    with pytest.raises(UserError, match='the loss of stage "towers" is not finite near step .*learning_rate'):
        loop.train(config, tmp_path / "run")
    assert latest(tmp_path / "run", list(STAGES)) is None
