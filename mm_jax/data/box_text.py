"""Boxes that models write as ordinary text, such as (10,20),(30,40)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mm_jax.data.image import Transform
from mm_jax.data.messages import Box, Part, Text

CORNERS = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class BoxText:
    """A text format of boxes.

    Attributes:
      form: how a box is written; {0} to {3} are x0, y0, x1, y1.
      pattern: regular expression that finds one; its groups are x0, y0, x1, y1, or have these names.
      scale: coordinates run from 0 to this over the picture; 0: they are pixels of the picture that the model sees.
      largest: the largest coordinate that is written, where the end of the scale is not; 0: the end is.
      decimals: places behind the point that are written; None: whole numbers.
      opening: regular expression that finds the beginning of a box at the end of a text behind which is no whole one.
      tags: what may stand around phrases and is no part of the text.
    """

    form: str
    pattern: str
    scale: int = 1000
    largest: int = 0
    decimals: int | None = None
    opening: str = ""
    tags: tuple[str, ...] = ()

    @property
    def begun(self) -> str:
        """Regular expression whose group "begun" is what may become a box at the end of a text; it passes over whole
        boxes, whose second half may look like the beginning of another one."""
        return f"{self.pattern}|(?P<begun>{self.opening})" if self.opening else ""

    def write(self, box: Box, transform: Transform) -> str:
        """A box in original pixels as text."""
        width, height = self._sides(transform)
        places = zip(transform.forward(box.box), (width, height) * 2, strict=True)
        rounded = [round(place * side, self.decimals) for place, side in places]
        return self.form.format(*(min(place, self.largest or place) for place in rounded))

    def parse(self, text: str, transforms: Sequence[Transform]) -> list[Part]:
        """Text with boxes to parts, boxes in original pixels. The text does not say of which picture a box is: of the
        first one. Without pictures it stays text."""
        for tag in self.tags:
            text = text.replace(tag, "")
        if not transforms:
            return [Text(text)] if text else []
        width, height = self._sides(transforms[0])
        parts: list[Part] = []
        end = 0
        for found in re.finditer(self.pattern, text):
            if found.start() > end:
                parts.append(Text(text[end : found.start()]))
            named = found.groupdict()
            corners = [named[name] for name in CORNERS] if named else found.groups()
            x0, y0, x1, y1 = map(float, corners)
            box = transforms[0].inverse((x0 / width, y0 / height, x1 / width, y1 / height))
            parts.append(Box(box, 0))
            end = found.end()
        if end < len(text):
            parts.append(Text(text[end:]))
        return parts

    def _sides(self, transform: Transform) -> tuple[float, float]:
        return (self.scale, self.scale) if self.scale else transform.size
