"""Whether a shortened quickstart run went through every stage and sees and hears.

usage: python tests/e2e/check_scores.py RUN [--margin POINTS]

Each check is a line; the last line counts them. Exit code 1 where one failed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

FILES = ("loss.png", "report.html", "scores.md", "scores.json", "answers.jsonl", "metrics.jsonl")
TASKS = ("speech", "colour")  # one that needs the clip, one that needs the picture


def checks(run: Path, margin: float) -> Iterator[tuple[str, bool]]:
    """(what, whether it holds)."""
    for name in FILES:
        yield name, (run / name).is_file() and (run / name).stat().st_size > 0
    config = run / "config.json"
    stages = json.loads(config.read_text())["stages"] if config.is_file() else {}
    yield "five stages", len(stages) == 5
    for name, stage in stages.items():
        step = stage["steps"]
        yield (
            f"checkpoint of {name} at step {step}",
            (run / "checkpoints" / name / str(step) / "params").is_dir(),
        )
    scores = run / "scores.json"
    tasks = json.loads(scores.read_text())["tasks"] if scores.is_file() else {}
    for name in TASKS:
        model, blanked = (100 * tasks.get(name, {}).get(key, 0.0) for key in ("model", "blanked"))
        what = f"{name}: {model:.1f} % right, {blanked:.1f} % blanked, {margin:.0f} points are asked for"
        yield what, model >= blanked + margin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--margin", type=float, default=15.0, help="points over the blanked model (15)")
    options = parser.parse_args()
    found = list(checks(options.run, options.margin))
    for what, holds in found:
        print(f"{'ok    ' if holds else 'FAILED'}  {what}")
    failed = sum(not holds for _, holds in found)
    print(f"{len(found) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
