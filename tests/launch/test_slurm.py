"""The batch script of Slurm: what it asks for, and what it does with stand-ins for Slurm's commands."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = "configs/llava_1_5_7b.py"
TOOLS = {
    # what a task of srun would see, and how it ends
    "srun": 'printf "%s\\n" "$@" >>"$CALLS"; exit "$ENDS"',
    "scontrol": 'echo "scontrol $*" >>"$CALLS"',
    "sbatch": 'cat >"$CALLS"; echo Submitted',
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in TOOLS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text("#!/bin/sh\n")
    (venv / "python").chmod(0o755)
    more = {"PATH": f"{tools}:{os.environ['PATH']}", "MM_JAX_VENV": str(venv.parent)}
    return {**os.environ, **more, "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "7"}


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "launch/slurm.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)


def directives(script: str) -> dict[str, str]:
    lines = script.splitlines()
    found = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH ")]
    # Slurm reads no more of them after the first command
    first = next(k for k, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    return dict(line.partition("=")[::2] for line in found)


def test_one_task_a_gpu_of_all_of_the_node(environment: dict[str, str]) -> None:
    options = ("--nodes", "4", "--gpus=2", "--partition", "gpu", "--account", "me", "--time", "1:00:00")
    done = submit(environment, *options, CONFIG, "--seed", "1", "--dry-run")
    assert done.returncode == 0, done.stderr
    asked = directives(done.stdout)
    assert asked["nodes"] == "4" and asked["ntasks-per-node"] == asked["gpus-per-node"] == "2"
    # a task that sees its own GPU alone would not find the one with its number on the node
    assert not any("gpu" in name and name != "gpus-per-node" for name in asked)
    assert "gpu-bind" not in done.stdout
    assert (asked["partition"], asked["account"], asked["time"]) == ("gpu", "me", "1:00:00")
    assert asked["signal"] == "TERM@300" and "requeue" in asked and asked["open-mode"] == "append"


def test_jax_finds_its_place_in_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variables of a task that this script starts: 3 nodes with 2 GPUs, the second of the second node."""
    from mm_jax.parallel.processes import find_place

    task = {"JOB_ID": "7", "STEP_NODELIST": "n[1-3]", "NTASKS": "6", "PROCID": "3", "LOCALID": "1"}
    for name, value in {**task, "STEP_NUM_NODES": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    place = find_place()
    assert (place.count, place.index, place.local_devices) == (6, 3, (1,))
    assert place.coordinator.startswith("n1:")


@pytest.mark.parametrize("ends", [0, 2, 75])
def test_what_is_unfinished_is_queued_again(ends: int, environment: dict[str, str], tmp_path: Path) -> None:
    done = submit(environment, CONFIG, "--name", "a b")
    assert (done.returncode, done.stdout) == (0, "Submitted\n"), done.stderr
    calls = Path(environment["CALLS"])
    script = calls.read_text()
    calls.unlink()
    run = ["bash", "-c", script]
    assert subprocess.run(run, env={**environment, "ENDS": str(ends)}).returncode == ends
    lines = calls.read_text().splitlines()
    words = [f"{tmp_path}/venv/bin/python", "-m", "mm_jax", "train", CONFIG, "--run", "runs/llava_1_5_7b"]
    start = lines.index(words[0])
    expected = [*words, "--name", "a b", "--unfinished", "75"]
    assert lines[start : start + len(expected)] == expected
    assert lines[start + len(expected) :] == ["scontrol requeue 7"] * (ends == 75)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "a config is needed"),
        (["configs/none.py"], "there is no config configs/none.py"),
        (["--nodes", "x", CONFIG], '--nodes is "x"'),
        (["--node", "2", CONFIG], "unknown option --node"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, environment: dict[str, str]) -> None:
    done = submit(environment, *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_without_an_environment_nothing_is_submitted(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "venv/bin/python").unlink()
    done = submit(environment, CONFIG)
    assert done.returncode == 2 and "there is no environment" in done.stderr
    assert not Path(environment["CALLS"]).exists()
