"""Processes on this machine that train or evaluate together, as those of a pod do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mm_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]

# one stage of the tiny run, with rows that 8 devices and 4 processes can share
CONFIG = """
import dataclasses, runpy, time
from mm_jax.train import loop
from mm_jax.train.config import CheckpointConfig

if {pause}:  # so that a signal comes in the middle
    one_step = loop._StageRun._one_step
    loop._StageRun._one_step = lambda self, done: (time.sleep({pause}), one_step(self, done))


def get_config():
    config = runpy.run_path({base!r})["get_config"]()
    stage = config.stages["align"]
    batch = dataclasses.replace(stage.batch, rows=8, streams=4)
    optimizer = dataclasses.replace(stage.optimizer, kind="adamw")
    stage = dataclasses.replace(
        stage, steps={steps}, batch=batch, optimizer=optimizer, trainable=(".*_projector", "decoder")
    )
    return dataclasses.replace(config, stages={{"align": stage}}, checkpoint=CheckpointConfig({every}), log_every=1)
"""


def write_config(path: Path, base: Path, steps: int, every: int, pause: float = 0) -> Path:
    """pause: seconds before every step."""
    path.write_text(CONFIG.format(base=str(base), steps=steps, every=every, pause=pause))
    return path


PREFERENCE = """
import dataclasses, runpy


def get_config():
    config = runpy.run_path({base!r})["get_config"]()
    stage = config.stages["prefer"]
    batch = dataclasses.replace(stage.batch, streams=2)
    preference = dataclasses.replace(stage.preference, questions=7)
    stage = dataclasses.replace(stage, batch=batch, preference=preference)
    return dataclasses.replace(config, stages={{"prefer": stage}}, log_every=1)
"""


def write_preference(path: Path, base: Path) -> Path:
    """The stage of the tiny run that makes its pairs itself, with an odd number of questions."""
    path.write_text(PREFERENCE.format(base=str(base)))
    return path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(cache: Path, devices: int) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTHONPATH": path,
    }


class Pod:
    """`count` processes with `devices` each; alone it is an ordinary run. Their output goes to files in `logs`.

    command: in place of training. start: only these. slurm: they learn their places from Slurm's variables.
    """

    def __init__(
        self,
        config: Path,
        run: Path,
        count: int,
        devices: int,
        *more: str,
        command: Sequence[str] = (),
        start: Sequence[int] | None = None,
        slurm: bool = False,
    ):
        self.run = run
        logs = config.parent / "logs"
        logs.mkdir(exist_ok=True)
        command = [*(command or ("train", str(config), "--run", str(run))), *more]
        command = [sys.executable, "-m", "mm_jax", *command]
        port = free_port()
        self.processes, self.logs = [], []
        for index in range(count) if start is None else start:
            variables, place = environment(config.parent / "cache", devices), []
            if slurm:
                variables |= {
                    "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count),
                    "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "JAX_COORDINATOR_PORT": str(port),
                }  # fmt: skip
            elif count > 1:
                place = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count)]
                place += ["--process-id", str(index)]
            log = logs / f"{run.name}-{count}-{index}-{time.monotonic_ns()}.txt"
            with log.open("w") as out:
                process = subprocess.Popen(
                    command + place, stdout=out, stderr=subprocess.STDOUT, env=variables
                )
            self.processes.append(process)
            self.logs.append(log)

    def steps(self) -> int:
        """The last step that was logged."""
        return max((line["step"] for line in read_metrics(self.run)), default=0)

    def wait_for(self, step: int, timeout: float = 900) -> None:
        """Until that step is logged, or all have ended."""
        end = time.monotonic() + timeout
        while self.steps() < step and any(process.poll() is None for process in self.processes):
            assert time.monotonic() < end, self.text()
            time.sleep(0.02)

    def wait(self, timeout: float = 900) -> list[int]:
        """Exit codes."""
        end = time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"still there after {timeout} s\n{self.text()}") from None
        return [process.returncode for process in self.processes]

    def kill(self) -> None:
        """kill -9 for all that are left."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def text(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)
