"""Answers as text, whole and piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mm_jax.data.messages import Box, Part, Text

if TYPE_CHECKING:
    from mm_jax.data.image import Transform
    from mm_jax.data.processor import Processor

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def render(parts: Sequence[Part]) -> str:
    """The parts of an answer as text; boxes as whole original pixels.

    >>> render([Text("at"), Box((3.6, 8, 20, 40))])
    'at [4, 8, 20, 40]'
    """
    text = ""
    for part in parts:
        piece = part.text if isinstance(part, Text) else ""
        if isinstance(part, Box):
            piece = "[" + ", ".join(str(round(v)) for v in part.box) + "]"
        glued = not text or not piece or text[-1].isspace() or piece[0].isspace()
        # the token of a word carries its leading space, location tokens have none
        text += piece if glued or (isinstance(part, Text) and not text.endswith("]")) else f" {piece}"
    return text.strip()


class TextStream:
    """Turns growing ids into growing text that never has to be taken back.

    A token may hold half of a multi-byte character, and a box needs all its tokens: such an end is held until
    it is complete.
    """

    def __init__(self, processor: Processor, transforms: Sequence[Transform] = ()):
        self._processor, self._transforms = processor, list(transforms)
        self.ids: list[int] = []
        self.text = ""

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` add."""
        self.ids += [int(i) for i in ids]
        whole = self._processor.complete(self.ids)
        return self._emit(self._processor.parts(whole, self._transforms), final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._emit(self._processor.parts(self.ids, self._transforms), final=True)

    def _emit(self, parts: Sequence[Part], final: bool) -> str:
        text = render(parts)
        if not final:
            text = text.rstrip(_REPLACEMENT)
        if not text.startswith(self.text):
            return ""
        new, self.text = text[len(self.text) :], text
        return new
