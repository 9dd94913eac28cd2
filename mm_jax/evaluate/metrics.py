"""Scores of answers against what was expected, and tables of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BoxTuple = tuple[float, float, float, float]


@dataclass(frozen=True)
class Scored:
    """One question with its expected answer and what was said to it.

    Attributes:
      task, source: of the question.
      expected, answer: as text.
      expected_box, answer_box: (x0, y0, x1, y1) in original pixels; expected_box makes it a grounding
        question.
      size: (width, height) of the picture that the box lies in.
    """

    task: str
    source: str
    expected: str
    answer: str
    expected_box: BoxTuple | None = None
    answer_box: BoxTuple | None = None
    size: tuple[int, int] = (0, 0)


def normalise(text: str) -> str:
    """Lower case, single spaces.

    >>> normalise("  A red  circle ")
    'a red circle'
    """
    return " ".join(text.lower().split())


def iou(a: BoxTuple | None, b: BoxTuple | None) -> float:
    """Intersection over union of two boxes; 0 when one is missing, empty or turned inside out.

    >>> iou((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333333333333
    """
    if a is None or b is None:
        return 0.0
    areas = [max(x1 - x0, 0) * max(y1 - y0, 0) for x0, y0, x1, y1 in (a, b)]
    if min(areas) <= 0:
        return 0.0
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (sum(areas) - shared)


def is_right(item: Scored) -> bool:
    """Exact match of the text; for grounding IoU of at least 0.5 (the usual threshold of RefCOCO)."""
    if item.expected_box is not None:
        return iou(item.expected_box, item.answer_box) >= 0.5
    return normalise(item.answer) == normalise(item.expected)


def accuracy(items: Sequence[Scored]) -> float:
    """Share of right answers."""
    return float(np.mean([is_right(item) for item in items]))


def mean_iou(items: Sequence[Scored]) -> float | None:
    """Of the grounding questions; None without any."""
    values = [iou(item.expected_box, item.answer_box) for item in items if item.expected_box is not None]
    return float(np.mean(values)) if values else None


def chance(items: Sequence[Scored]) -> float:
    """Accuracy of always giving the commonest expected answer.

    For boxes that is the median box, in fractions of the picture.
    """
    texts = [normalise(item.expected) for item in items if item.expected_box is None]
    right = Counter(texts).most_common(1)[0][1] if texts else 0
    boxed = [item for item in items if item.expected_box is not None]
    if boxed:
        scales = np.array([(*item.size, *item.size) for item in boxed], np.float64)
        scales = np.where(scales > 0, scales, 1)
        median = np.median(np.array([item.expected_box for item in boxed]) / scales, axis=0)
        right += sum(
            iou(item.expected_box, tuple(median * scale)) >= 0.5
            for item, scale in zip(boxed, scales, strict=True)
        )
    return right / len(items)


def false_yes(items: Sequence[Scored]) -> tuple[float, int] | None:
    """(share of "yes" among questions about something absent, number of them); None without any.

    These are the questions of the task "exists" whose answer is no (POPE, Li et al. 2023).
    """
    absent = [item for item in items if item.task == "exists" and normalise(item.expected) == "no"]
    if not absent:
        return None
    said = [normalise(item.answer).split()[:1] == ["yes"] for item in absent]
    return float(np.mean(said)), len(absent)


def table(items: Sequence[Scored], blanked: Sequence[Scored] | None = None) -> dict:
    """{"n", "model", "blanked", "chance", and for grounding "mean_iou", "mean_iou_blanked"} of one group."""
    row: dict = {"n": len(items), "model": accuracy(items)}
    if blanked is not None:
        row["blanked"] = accuracy(blanked)
    row["chance"] = chance(items)
    if (overlap := mean_iou(items)) is not None:
        row["mean_iou"] = overlap
        if blanked is not None:
            row["mean_iou_blanked"] = mean_iou(blanked)
    return row


def summary(items: Sequence[Scored], blanked: Sequence[Scored] | None = None) -> dict:
    """Scores by task and by source and task.

    Returns:
      {"tasks": {task: row}, "sources": {source: {task: row}}, "false_yes": {"n", "model", "blanked"}}, rows
      as in `table`; "false_yes" is absent without questions about absent objects.
    """

    def rows(keep: object) -> dict:
        index = [i for i, item in enumerate(items) if keep(item)]
        return table([items[i] for i in index], None if blanked is None else [blanked[i] for i in index])

    tasks = sorted({item.task for item in items})
    pairs = sorted({(item.source, item.task) for item in items})
    result: dict = {
        "tasks": {task: rows(lambda item, t=task: item.task == t) for task in tasks},
        "sources": {},
    }
    for source, task in pairs:
        row = rows(lambda item, s=source, t=task: (item.source, item.task) == (s, t))
        result["sources"].setdefault(source, {})[task] = row
    if (found := false_yes(items)) is not None:
        result["false_yes"] = {"n": found[1], "model": found[0]}
        if blanked is not None:
            result["false_yes"]["blanked"] = false_yes(blanked)[0]
    return result


def markdown(scores: dict) -> str:
    """The table of `summary` for people: per cent, one line a task."""

    def cell(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    lines = ["| task | n | model | blanked | chance |", "|---|---:|---:|---:|---:|"]
    for task, row in scores["tasks"].items():
        values = " | ".join(cell(row.get(name)) for name in ("model", "blanked", "chance"))
        lines.append(f"| {task} | {row['n']} | {values} |")
    for task, row in scores["tasks"].items():
        if "mean_iou" in row:
            values = " | ".join(cell(row.get(name)) for name in ("mean_iou", "mean_iou_blanked"))
            lines.append(f"| {task}, mean IoU | {row['n']} | {values} | |")
    if row := scores.get("false_yes"):
        values = " | ".join(cell(row.get(name)) for name in ("model", "blanked"))
        lines.append(f"| false yes (lower is better) | {row['n']} | {values} | |")
    return "\n".join(lines) + "\n"
