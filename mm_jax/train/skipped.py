"""Updates that were not done: counted, and written down with the samples of their batches."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mm_jax.errors import UserError
from mm_jax.parallel import processes
from mm_jax.train.metrics import read_lines

Metrics = dict[str, np.ndarray]


class Skipped:
    """What the steps of a stage skip.

    Args:
      directory: of the run; `skipped.jsonl` in it has a line for each update that was not done.
      stage, step: where the run goes on; lines of later steps are removed.
      limit: updates skipped one after another that stop the run.
      total: skipped in this stage before `step`.
    """

    def __init__(self, directory: Path, stage: str, stages: list[str], step: int, limit: int, total: int):
        self.path, self.stage, self.limit, self.total = directory / "skipped.jsonl", stage, limit, total
        self.streak = 0
        self.finite = True  # the newest step
        if processes.is_first() and self.path.exists():
            lines = read_lines(self.path)
            here = (stages.index(stage), step)
            kept = [line for line in lines if (stages.index(line["stage"]), line["step"]) <= here]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(self.path)

    def sort_out(self, steps: list[tuple[int, Metrics, tuple[str, ...]]]) -> list[Metrics]:
        """The metrics of the updates that were done, of (step, metrics, samples of this process).

        Raises:
            UserError: too many were skipped one after another.
        """
        good = []
        for step, found, samples in steps:
            loss, norm = (float(found[name][0] / found[name][1]) for name in ("loss", "grad_norm"))
            self.finite = bool(np.isfinite(loss) and np.isfinite(norm))
            if not found["skipped"][0]:
                self.streak = 0
                good.append(found)
                continue
            self.streak, self.total = self.streak + 1, self.total + 1
            everyone = dict.fromkeys(sample for one in processes.gather(samples) for sample in one)
            reason = "spike" if self.finite else "not finite"
            line = {"stage": self.stage, "step": step, "reason": reason, "loss": _number(loss)}
            self._write(line | {"grad_norm": _number(norm), "samples": list(everyone)})
            text = (
                f"{self.stage} {step}: update skipped ({reason}: loss {loss:.4g}, gradient norm {norm:.4g})"
            )
            if processes.is_first():
                tqdm.write(text, file=sys.stderr)
            if self.streak >= self.limit:
                raise UserError(
                    f'stage "{self.stage}": {self.streak} updates in a row up to step {step} were skipped ({reason}); '
                    f"their samples are in {self.path}; earlier checkpoints are intact"
                )
        return good

    def _write(self, line: dict[str, Any]) -> None:
        if processes.is_first():
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            text = "{stage} {step}: update skipped ({reason}: loss {loss}, gradient norm {grad_norm})".format(
                **line
            )
            tqdm.write(text, file=sys.stderr)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if np.isfinite(value) else None
