"""The media rules of a model that was put together from parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mm_jax.data.image import Transform
from mm_jax.data.media_rule import Arrays, Item, MediaRule


class JoinedRule(MediaRule):
    """One rule for each kind of media, and a chat template that knows of none.

    Args:
      rules: by kind.
      placeholders: the media tokens, by kind. A message is its parts on lines of their own, as in LLaVA's data.
    """

    joined = "\n"

    def __init__(self, rules: Mapping[str, MediaRule], placeholders: Mapping[str, str]):
        super().__init__()
        self.rules, self.placeholders = dict(rules), dict(placeholders)
        self.tokens = {kind: rule.tokens[kind] for kind, rule in rules.items()}
        self.names = {kind: rule.names[kind] for kind, rule in rules.items()}

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        return self.rules["image"].images(images)

    def audio(self, clips: Sequence[np.ndarray]) -> Arrays:
        return self.rules["audio"].audio(clips)

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        return self.rules[kind].items(kind, arrays, counts)

    def transform(self, size: tuple[int, int]) -> Transform:
        return self.rules["image"].transform(size)
