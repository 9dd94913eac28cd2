"""`python -m tests.parity.table`: run the parity tests and write their results into the table in README.md."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- parity table -->", "<!-- end of the parity table -->"
COLUMNS = {
    "logits": "logits, largest error",
    "gradient": "gradient, largest relative error",
    "greedy": "greedy answers",
    "preprocessing": "preprocessing",
    "round trip": "round trip",
}


def table(found: Mapping[str, Mapping[str, list]]) -> str:
    """A row a family; an empty cell where no test has looked.

    >>> print(table({"llama": {"logits": [1e-6, 3e-6], "greedy": [True]}}).splitlines()[-1])
    | `llama` | 3.0e-06 | | equal | | |
    """
    lines = [f"| `model_type` | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in sorted(found):
        cells = [_cell(found[family].get(column, [])) for column in COLUMNS]
        lines.append(f"| `{family}` |" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return "\n".join(lines)


def _cell(values: list) -> str:
    if not values:
        return ""
    if all(value is True for value in values):
        return "equal"
    worst = max(float(value) for value in values if value is not True)
    return "equal" if worst == 0 else f"{worst:.1e}"


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "found.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "tests/parity",
            f"--parity-json={path}",
            *sys.argv[1:],
        ]
        failed = subprocess.run(command, cwd=ROOT).returncode
        if failed:
            print("the tests have failed, so README.md stays as it is", file=sys.stderr)
            return failed
        found = json.loads(path.read_text())
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
