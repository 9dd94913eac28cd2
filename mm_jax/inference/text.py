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


def answer_ids(output: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """New ids up to the first stop id, which is left out.

    >>> answer_ids([7, 8, 3, 0, 0], (3,))
    [7, 8]
    """
    ids = [int(i) for i in output]
    return ids[: next((k for k, i in enumerate(ids) if i in stop_ids), None)]


class TextStream:
    """Turns growing ids into growing text that never has to be taken back.

    A token may hold half of a multi-byte character, a box needs all its tokens, and a stop text may come in pieces:
    such an end is held until it is complete.

    Args:
      stop: texts that end the answer; they are left out.

    Attributes:
      ids, text: what came in, and what went out.
      stopped: a stop text was met.
    """

    def __init__(self, processor: Processor, transforms: Sequence[Transform] = (), stop: Sequence[str] = ()):
        self._processor, self._transforms, self._stop = processor, list(transforms), tuple(stop)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` add."""
        self.ids += [int(i) for i in ids]
        return self._emit(self.parts(self._processor.complete(self.ids)), final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._emit(self.parts(self.ids), final=True)

    def parts(self, ids: Sequence[int]) -> list[Part]:
        """Ids as text and boxes."""
        return self._processor.parts(ids, self._transforms)

    def _emit(self, parts: Sequence[Part], final: bool) -> str:
        if self.stopped:
            return ""
        text = render(parts)
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif not final:
            text = text.rstrip(_REPLACEMENT)
            text = text[: len(text) - max((beginning(text, stop) for stop in self._stop), default=0)]
        if not text.startswith(self.text):
            return ""
        new, self.text = text[len(self.text) :], text
        return new


def beginning(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:k])), 0)
