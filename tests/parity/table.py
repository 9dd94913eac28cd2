"""`python -m tests.parity.table`: run the parity tests and write their results into the table in README.md.

With `--found FILE` what each file of tests found is kept there, and a run that was stopped goes on where it was. Delete
the file after a change of the code.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- parity table -->", "<!-- end of the parity table -->"
# what notes something for the table
CHECKS = re.compile(
    r"\b(same_(logits|greedy|after_saving|gradients|features|preprocessing|pixels)|came_back|note|case.check\w*)\("
)
COLUMNS = {
    "logits": "logits or features, largest error",
    "gradient": "gradients, largest relative error",
    "greedy": "greedy answers",
    "preprocessing": "preprocessing, largest error",
    "round trip": "round trip",
}
# where there are no gradients of a reference: against differences of our own forward
DIFFERENCES = "by differences"

Found = dict[str, dict[str, list]]  # as of `tests.parity.record`


def table(found: Mapping[str, Mapping[str, list]]) -> str:
    """A row a family; an empty cell where no test has looked.

    >>> print(table({"llama": {"logits": [1e-6, 3e-6], "greedy": [True]}}).splitlines()[-1])
    | `llama` | 3.0e-06 | | equal | | |
    >>> print(table({"qwen": {"differences": [1e-6]}}).splitlines()[-1])
    | `qwen` | | 1.0e-06 by differences | | | |
    """
    lines = [f"| `model_type` | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in sorted(found):
        cells = {column: _cell(found[family].get(column, [])) for column in COLUMNS}
        if not cells["gradient"] and (cell := _cell(found[family].get("differences", []))):
            cells["gradient"] = f"{cell} {DIFFERENCES}"
        lines.append(
            f"| `{family}` |" + "|".join(f" {cell} " if cell else " " for cell in cells.values()) + "|"
        )
    return "\n".join(lines)


def _cell(values: list) -> str:
    if not values:
        return ""
    if all(value is True for value in values):
        return "equal"
    worst = max(float(value) for value in values if value is not True)
    return "equal" if worst == 0 else f"{worst:.1e}"


def merged(parts: list[Found]) -> Found:
    """What several runs found.

    >>> merged([{"opt": {"logits": [1.0]}}, {"opt": {"logits": [2.0], "greedy": [True]}}])
    {'opt': {'logits': [1.0, 2.0], 'greedy': [True]}}
    """
    whole: Found = {}
    for part in parts:
        for family, columns in part.items():
            for column, values in columns.items():
                whole.setdefault(family, {}).setdefault(column, []).extend(values)
    return whole


def files() -> list[Path]:
    """The tests that make one of the checks."""
    found = sorted((ROOT / "tests" / "parity").glob("test_*.py"))
    return [file for file in found if CHECKS.search(file.read_text(encoding="utf-8"))]


def _read(path: Path) -> dict[str, Found]:
    """By file of tests, those alone in which no test has failed."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return {name: part for name, part in found.items() if part is not None}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--found", metavar="FILE", type=Path, help="keep what was found, and go on from there"
    )
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        # written after each file of tests, and read again in whatever way the run ended
        path = options.found or Path(directory) / "found.json"
        part = path.with_name(f"{path.name}.part")
        kept, code = _read(path) | _read(part), 0
        path.write_text(json.dumps(kept))
        if left := [str(file) for file in files() if file.name not in kept]:
            command = [sys.executable, "-m", "pytest", "-q", "--slow", *left, f"--parity-json={part}", *more]
            code = subprocess.run(command, cwd=ROOT).returncode
            kept |= _read(part)
            path.write_text(json.dumps(kept))
        part.unlink(missing_ok=True)
    lost = [file.name for file in files() if file.name not in kept]
    if code or lost:
        print(f"{', '.join(lost)}: failed or not run, so README.md stays as it is", file=sys.stderr)
        return code or 1
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        print(f"README.md has no lines {BEGIN} and {END}", file=sys.stderr)
        return 1
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    against = (
        f"Against transformers {version('transformers')} and torch {version('torch')}, float32 on a CPU."
    )
    written = f"{before}{BEGIN}\n{table(merged(list(kept.values())))}\n\n{against}\n{END}{after}"
    readme.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
