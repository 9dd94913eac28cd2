"""What the parity checks found, for the table in README.md (see `tests.parity.table`)."""

from __future__ import annotations

from collections import defaultdict

# family -> column -> what its checks found: the largest difference, or True for what is equal
FOUND: dict[str, dict[str, list[float | bool]]] = defaultdict(lambda: defaultdict(list))


def note(family: str, column: str, value: float | bool) -> None:
    """Called by a check that has passed."""
    FOUND[family][column].append(value)
