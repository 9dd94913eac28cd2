"""Runs of several processes on loopback: one result, one stop, no loss by kill -9 or by another number of them."""

import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from pod import Pod, write_config, write_preference

from mm_jax.checkpoint.run import latest, load_params
from mm_jax.train.metrics import read_metrics
from tests.train.conftest import CONFIG, write_data

STEPS = 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pod")
    write_data(root)
    (root / "base.py").write_text(CONFIG.format(root=root))
    write_config(root / "config.py", root / "base.py", STEPS, every=3)
    write_config(root / "slow.py", root / "base.py", STEPS, every=3, pause=0.7)
    return root


def losses(run: Path) -> np.ndarray:
    """[steps, (step, loss, gradient norm)]"""
    return np.array([[x["step"], x["loss"], x["grad_norm"]] for x in read_metrics(run) if "loss" in x])


def params(run: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in flatten_dict(load_params(run), sep="/").items()}


@pytest.fixture(scope="module")
def alone(directory: Path) -> Path:
    """A run of one process with one device."""
    pod = Pod(directory / "config.py", directory / "alone", 1, 1)
    assert pod.wait() == [0], pod.text()
    return pod.run


def assert_equal_runs(one: Path, two: Path) -> None:
    a, b = losses(one), losses(two)
    np.testing.assert_array_equal(a[:, 0], np.arange(1, STEPS + 1))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    a, b = params(one), params(two)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, err_msg=name)


def test_four_processes_stop_together_and_two_go_on(directory: Path, alone: Path) -> None:
    """SIGTERM to one of four; two take over their streams, and one is killed. Every loss is as in one process."""
    config, run = directory / "slow.py", directory / "four"
    pod = Pod(config, run, 4, 1, "--unfinished", "75")
    pod.wait_for(2)
    pod.processes[2].send_signal(signal.SIGTERM)
    assert pod.wait() == [75] * 4, pod.text()
    stage, step = latest(run, ["align"])
    assert pod.steps() == step < STEPS, pod.text()
    assert "stopped and saved; go on with" in pod.logs[0].read_text()
    for log in pod.logs[1:]:  # only the first one speaks
        assert "loss" not in log.read_text() and "stopped" not in log.read_text()
    pod = Pod(config, run, 2, 2)
    pod.wait_for(step + 1)
    pod.processes[1].kill()
    pod.kill()
    assert latest(run, ["align"])[1] >= step
    pod = Pod(config, run, 2, 2, "--unfinished", "75")
    assert pod.wait() == [0, 0], pod.text()
    assert_equal_runs(alone, run)
    lines = {x["step"]: x for x in read_metrics(run) if "loss" in x}
    for one in read_metrics(alone):
        for name in ("trainable_tokens/pictures", "trainable_tokens/sounds", "dropped"):
            assert one.get(name) == lines.get(one["step"], one).get(name), name
    assert 0 < lines[STEPS]["goodput"] < 1


@pytest.mark.slow
def test_devices_may_be_eight_then_four_then_one_then_eight(directory: Path, alone: Path) -> None:
    config, run = directory / "slow.py", directory / "devices"
    for devices, mesh, stop in ((8, "fsdp", 2), (4, "fsdp", 4), (1, "fsdp", 6), (8, "data", STEPS)):
        pod = Pod(config, run, 1, devices, f"--mesh.{mesh}", str(devices))
        pod.wait_for(stop)
        if stop < STEPS:
            pod.processes[0].send_signal(signal.SIGTERM)
        assert pod.wait() == [0], pod.text()
    assert_equal_runs(alone, run)


@pytest.mark.slow
def test_two_and_two_processes_share_rows(directory: Path, alone: Path) -> None:
    """Each pair reads the same samples, and each of it has one half of every row."""
    run = directory / "halves"
    pod = Pod(directory / "config.py", run, 4, 1, "--mesh.context", "2", "--mesh.data", "2")
    assert pod.wait() == [0] * 4, pod.text()
    assert_equal_runs(alone, run)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_and_resumed_equals_uninterrupted(directory: Path) -> None:
    """kill -9 of one of two processes, saves included: the end is that of a run that nobody killed, bit for bit."""
    kills, steps, rng = 20, 120, random.Random(1)
    config = write_config(directory / "kills.py", directory / "base.py", steps, every=1)
    whole, killed = directory / "whole", directory / "killed"
    pod = Pod(config, whole, 2, 1)
    assert pod.wait() == [0, 0], pod.text()
    done, saving = 0, 0
    for _ in range(kills):
        pod = Pod(config, killed, 2, 1)
        pod.wait_for(min(done + 1 + rng.randrange(1 + 2 * steps // kills), steps - 1))
        time.sleep(rng.random() * 0.1)
        pod.processes[rng.randrange(2)].kill()
        saving += any(killed.glob("checkpoints/*/*tmp*"))
        time.sleep(rng.random())
        pod.kill()  # as an orchestrator does
        done = (latest(killed, ["align"]) or ("", 0))[1]
    pod = Pod(config, killed, 2, 1)
    assert pod.wait() == [0, 0], pod.text()
    np.testing.assert_array_equal(losses(whole), losses(killed))
    one, two = params(whole), params(killed)
    for path in one:
        np.testing.assert_array_equal(one[path], two[path], err_msg=path)
    assert saving  # some were killed during a save


def test_a_process_that_does_not_come_is_named(directory: Path) -> None:
    pod = Pod(directory / "config.py", directory / "none", 3, 1, "--start-timeout", "4", start=(0, 2))
    assert pod.wait(300) == [2, 2], pod.text()
    for log in pod.logs:
        assert "mm_jax train: 1 of 3 processes have not come within 4 s: 1; there are 0 (" in log.read_text()
        assert "Traceback" not in log.read_text()


def test_a_mistake_in_one_process_ends_all_with_one_line(directory: Path) -> None:
    """Six sounds cannot be shared by eight streams."""
    few = ("--stages.align.batch.streams", "8")
    pod = Pod(directory / "config.py", directory / "few", 2, 1, *few, slurm=True)
    assert pod.wait() == [2, 2], pod.text()
    for log in pod.logs:
        assert 'source "sounds" holds 6 samples, fewer than the 8 processes or streams' in log.read_text()
        assert "Traceback" not in log.read_text()


def test_the_saved_state_of_the_data_has_all_streams(directory: Path, alone: Path) -> None:
    path = alone / "checkpoints" / "align" / str(STEPS) / "data" / "metadata"
    state = json.loads(path.read_text())
    assert len(state["streams"]) == 4 and state["first"] == 0


def test_preference_pairs_of_two_processes_are_those_of_one(directory: Path) -> None:
    """Each asks and scores its share: 7 questions, one more for the first."""
    config, made = write_preference(directory / "prefer.py", directory / "base.py"), []
    for count in (1, 2):
        pod = Pod(config, directory / f"prefer{count}", count, 2 // count)
        assert pod.wait() == [0] * count, pod.text()
        found = pod.run / "preferences" / "prefer"
        made.append(
            (np.load(found / "reference.npy"), (found / "preferences.jsonl").read_text(), losses(pod.run))
        )
    (one, pairs, curve), (two, same, other) = made
    assert pairs == same and len(pairs.splitlines()) == len(one) >= 5
    np.testing.assert_allclose(one, two, atol=1e-5)
    np.testing.assert_allclose(curve, other, rtol=1e-5, atol=1e-5)


def test_processes_evaluate_together_though_one_has_no_question(directory: Path, alone: Path) -> None:
    answers = []
    for count in (1, 2):
        out = directory / f"scores{count}"
        data = ("--data", str(directory / "sounds.jsonl"), "--limit", "1", "--batch", "1")
        command = ("evaluate", str(alone), *data, "--max-new-tokens", "4", "--out", str(out))
        pod = Pod(directory / "config.py", out, count, 1, command=command)
        assert pod.wait() == [0] * count, pod.text()
        assert "| tone | 1 |" in pod.logs[0].read_text()
        assert count == 1 or "| tone |" not in pod.logs[1].read_text()
        answers.append(((out / "answers.jsonl").read_text(), (out / "scores.json").read_text()))
    assert answers[0] == answers[1] and len(answers[0][0].splitlines()) == 1
