"""Boxes drawn into pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw

EXPECTED = (22, 163, 74)
ANSWER = (220, 38, 38)

Boxes = Sequence[tuple[Sequence[float], tuple[int, int, int]]]


def enlarge(picture: PIL.Image.Image, side: int = 320) -> tuple[PIL.Image.Image, int]:
    """A small picture by the largest whole factor that keeps it within `side`, pixels kept sharp."""
    factor = max(1, side // max(picture.size))
    size = picture.width * factor, picture.height * factor
    return picture.resize(size, PIL.Image.Resampling.NEAREST), factor


def draw_boxes(picture: PIL.Image.Image, boxes: Boxes, factor: float = 1, width: int = 0) -> PIL.Image.Image:
    """A copy of the picture with outlines.

    Args:
      boxes: ((x0, y0, x1, y1) in original pixels, colour).
      factor: by which the picture has been enlarged.
      width: of the lines; 0 chooses one by the picture's size.
    """
    picture = picture.convert("RGB").copy()
    draw = PIL.ImageDraw.Draw(picture)
    width = width or max(1, math.ceil(max(picture.size) / 160))
    for box, colour in boxes:
        x0, y0, x1, y1 = (value * factor for value in box)
        x1, y1 = min(x1, picture.width) - 1, min(y1, picture.height) - 1
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=width)
    return picture
