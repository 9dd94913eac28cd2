"""Metrics by literal examples."""

import pytest

from mm_jax.evaluate.metrics import Scored, chance, false_yes, iou, is_right, markdown, normalise, summary


def answer(expected: str, said: str, task: str = "count", source: str = "scenes") -> Scored:
    return Scored(task, source, expected, said)


def test_exact_match_ignores_case_and_spaces():
    assert normalise("  A  Red circle\n") == "a red circle"
    assert is_right(answer("Two", " two "))
    assert not is_right(answer("two", "two circles"))
    assert not is_right(answer("two", ""))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),
        ((0, 0, 10, 10), (0, 0, 10, 5), 0.5),
        ((0, 0, 10, 10), (20, 20, 30, 30), 0.0),
        ((0, 0, 10, 10), (10, 10, 0, 0), 0.0),
        ((0, 0, 10, 10), (5, 5, 5, 5), 0.0),
        ((0, 0, 10, 10), None, 0.0),
    ],
)
def test_iou(a, b, expected):
    assert iou(a, b) == pytest.approx(expected)


def test_grounding_is_right_from_one_half():
    box = (0.0, 0.0, 10.0, 10.0)
    assert is_right(Scored("grounding", "s", "", "", box, (0, 0, 10, 5), (20, 20)))
    assert not is_right(Scored("grounding", "s", "", "", box, (0, 0, 10, 4.9), (20, 20)))
    assert not is_right(Scored("grounding", "s", "", "[0, 0, 10, 10]", box, None, (20, 20)))


def test_chance_is_the_commonest_answer():
    assert chance([answer("2", "x"), answer("2", "y"), answer("3", "z")]) == pytest.approx(2 / 3)


def test_chance_of_boxes_is_the_median_box():
    # three pictures of different sizes; two boxes fill the left half, one a corner
    items = [
        Scored("grounding", "s", "", "", (0, 0, 10, 20), None, (20, 20)),
        Scored("grounding", "s", "", "", (0, 0, 50, 40), None, (100, 40)),
        Scored("grounding", "s", "", "", (9, 9, 10, 10), None, (10, 10)),
    ]
    assert chance(items) == pytest.approx(2 / 3)


def test_false_yes_counts_absent_objects_only():
    items = [
        answer("no", "yes", "exists"),
        answer("no", "No", "exists"),
        answer("no", "yes it is", "exists"),
        answer("no", "yesterday", "exists"),
        answer("yes", "yes", "exists"),
        answer("no", "yes", "other"),
    ]
    assert false_yes(items) == (0.5, 4)
    assert false_yes(items[-1:]) is None


def test_summary_and_table():
    items = [
        answer("1", "1"),
        answer("2", "3"),
        answer("no", "yes", "exists"),
        Scored("grounding", "other", "", "", (0, 0, 4, 4), (0, 0, 4, 2), (8, 8)),
    ]
    blanked = [
        answer("1", "0"),
        answer("2", "3"),
        answer("no", "no", "exists"),
        Scored("grounding", "other", "", "", (0, 0, 4, 4), None, (8, 8)),
    ]
    scores = summary(items, blanked)
    assert scores["tasks"]["count"] == {"n": 2, "model": 0.5, "blanked": 0.0, "chance": 0.5}
    assert scores["tasks"]["grounding"]["mean_iou"] == pytest.approx(0.5)
    assert scores["sources"]["scenes"]["exists"]["model"] == 0.0
    assert list(scores["sources"]["other"]) == ["grounding"]
    assert scores["false_yes"] == {"n": 1, "model": 1.0, "blanked": 0.0}
    lines = markdown(scores).splitlines()
    assert lines[0] == "| task | n | model | blanked | chance |"
    assert "| count | 2 | 50.0 | 0.0 | 50.0 |" in lines
    assert "| grounding, mean IoU | 1 | 50.0 | 0.0 | |" in lines
    assert "| false yes (lower is better) | 1 | 100.0 | 0.0 | |" in lines
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_without_the_blanked_model():
    scores = summary([answer("1", "1")])
    assert scores["tasks"]["count"] == {"n": 1, "model": 1.0, "chance": 1.0}
    assert "| count | 1 | 100.0 |  | 100.0 |" in markdown(scores)
