"""Boxes as ordinary text."""

import pytest

from mm_jax.data.box_text import BoxText
from mm_jax.data.image import Transform
from mm_jax.data.joined_rule import BOXES
from mm_jax.data.messages import Box, Text

PAIRS = BoxText("<box>({0},{1}),({2},{3})</box>", r"<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>")
PIXELS = BoxText('"bbox": [{0}, {1}, {2}, {3}]', r'"bbox": \[(\d+), (\d+), (\d+), (\d+)\]', scale=0)
WIDE = Transform((400, 100), (0.5, 1.0), (0, 0), (200, 100))  # squeezed to half its width


@pytest.mark.parametrize(
    "form, text",
    [
        (PAIRS, "<box>(250,100),(500,1000)</box>"),
        (PIXELS, '"bbox": [50, 10, 100, 100]'),
        (BOXES, "[250, 100, 500, 1000]"),
    ],
)
def test_there_and_back(form, text):
    box = Box((100.0, 10.0, 200.0, 100.0), 0)
    assert form.write(box, WIDE) == text
    assert form.parse(f"a {text}{text} b", [WIDE]) == [Text("a "), box, box, Text(" b")]


def test_without_pictures_it_stays_text():
    text = "<box>(1,2),(3,4)</box>"
    assert (
        PAIRS.parse(text, []) == [Text(text)] and PAIRS.parse("", []) == [] and PAIRS.parse("", [WIDE]) == []
    )
