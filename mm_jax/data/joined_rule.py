"""The media rules of a model that was put together from parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mm_jax.data.box_text import BoxText
from mm_jax.data.image import Transform
from mm_jax.data.media_rule import Arrays, Item, MediaRule
from mm_jax.data.messages import Box, Part

# thousandths of the picture that the model sees, in characters that every tokenizer has
BOXES = BoxText("[{0}, {1}, {2}, {3}]", r"\[(\d+), ?(\d+), ?(\d+), ?(\d+)\]", opening=r"\[(\d[\d, ]*)?$")


class JoinedRule(MediaRule):
    """One rule for each kind of media, and a chat template that knows of none.

    Args:
      rules: by kind.
      placeholders: the media tokens, by kind. A message is its parts on lines of their own, as in LLaVA's data.
      axes: of the decoder's positions, 0 for one that is not listed.
    """

    joined = "\n"
    opening = BOXES.begun

    def __init__(self, rules: Mapping[str, MediaRule], placeholders: Mapping[str, str], axes: int = 0):
        super().__init__()
        self.axes = axes
        self.rules, self.placeholders = dict(rules), dict(placeholders)
        self.tokens = {kind: rule.tokens[kind] for kind, rule in rules.items()}
        self.names = {kind: rule.names[kind] for kind, rule in rules.items()}

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        return self.rules["image"].images(images)

    def audio(self, clips: Sequence[np.ndarray]) -> Arrays:
        return self.rules["audio"].audio(clips)

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        return self.rules[kind].items(kind, arrays, counts)

    def spans(self, longest: int) -> Iterable[int]:
        return self.rules["image"].spans(longest) if "image" in self.rules else ()

    def positions(self, tokens: np.ndarray, items: Mapping[str, Sequence[Item]]) -> np.ndarray:
        found = (
            self.rules["image"].positions(tokens, items) if "image" in self.rules else np.arange(len(tokens))
        )
        found = found.astype(np.int32)
        return found if found.ndim > 1 or not self.axes else np.repeat(found[:, None], self.axes, axis=1)

    def write_box(self, box: Box, transform: Transform) -> str:
        return BOXES.write(box, transform)

    def parse(self, text: str, transforms: Sequence[Transform]) -> list[Part]:
        return BOXES.parse(text, transforms)

    def transform(self, size: tuple[int, int]) -> Transform:
        return self.rules["image"].transform(size)

    def framing(self, size: tuple[int, int]) -> Transform:
        return self.rules["image"].framing(size)

    def grid(self, size: tuple[int, int]) -> tuple[int, int] | None:
        return self.rules["image"].grid(size)
