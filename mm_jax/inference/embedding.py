"""What can be turned into a vector, and vectors of unit length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mm_jax.data.messages import Message, Part, Text, parts_from_json
from mm_jax.errors import UserError

# a text, a part of a message (JSON objects too), several parts, or token ids
Input = str | dict | Part | Sequence[int] | Sequence[dict | Part]


def is_ids(value: object) -> bool:
    """Whether it is a list of token ids."""
    return isinstance(value, list | tuple | np.ndarray) and len(value) > 0 and all(map(_is_id, value))


def _is_id(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def question(one: Input) -> Message:
    """A text or parts as a user's message. Raises UserError where there is nothing in it."""
    parts: list[Part] = []
    for part in one if isinstance(one, list | tuple) else [one]:
        if isinstance(part, str):
            parts.append(Text(part))
        else:
            parts += parts_from_json([part], "an input") if isinstance(part, dict) else [part]
    if not any(not isinstance(part, Text) or part.text.strip() for part in parts):
        raise UserError("there is nothing to embed in an empty input")
    return Message("user", tuple(parts))


def unit(vectors: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """[n, D] -> float32 [n, D], each divided by its length."""
    found = np.asarray(vectors, np.float32)
    return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)
