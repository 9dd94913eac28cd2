"""Pictures whose encoder reads the instruction too: InstructBLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mm_jax.data.media_rule import FixedImage, Item, Settings
from mm_jax.errors import UserError


class InstructedImage(FixedImage):
    """`FixedImage` with the token ids of an instruction beside each picture.

    Args:
      vocab, longest: of the instructions.
    """

    names = {"image": ("pixel_values", "qformer_input_ids", "qformer_attention_mask")}

    def __init__(self, settings: Settings, *, vocab: int, longest: int, **fixed: Any):
        super().__init__(settings, **fixed)
        self.vocab, self.longest = vocab, longest

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        if "pixel_values" not in arrays:
            raise UserError("there are instructions for pictures, but no pixel_values")
        items = super().items(kind, {"pixel_values": arrays["pixel_values"]}, counts)
        found = self._instructions(arrays, len(items))
        return [
            Item(item.index, item.features, item.arrays | {"instructions": row[None]})
            for item, row in zip(items, found, strict=True)
        ]

    def _instructions(self, arrays: Mapping[str, np.ndarray], pictures: int) -> np.ndarray:
        """int32 [pictures, longest], -1 behind the end."""
        if "qformer_input_ids" not in arrays:
            raise UserError(
                "this model reads an instruction beside each picture: qformer_input_ids [pictures, length]"
            )
        ids = np.asarray(arrays["qformer_input_ids"])
        real = np.asarray(arrays.get("qformer_attention_mask", np.ones_like(ids))).astype(bool)
        if ids.ndim != 2 or len(ids) != pictures or real.shape != ids.shape:
            raise UserError(
                f"qformer_input_ids has shape {list(ids.shape)}, qformer_attention_mask {list(real.shape)}; one row "
                f"for each of the {pictures} pictures is needed"
            )
        if real[:, self.longest :].any() or not np.where(real, (ids >= 0) & (ids < self.vocab), True).all():
            raise UserError(
                f"qformer_input_ids: at most {self.longest} tokens from 0 to {self.vocab - 1} are needed"
            )
        rows = np.full((pictures, self.longest), -1, np.int32)
        length = min(ids.shape[1], self.longest)
        rows[:, :length] = np.where(real, ids, -1)[:, :length]
        return rows
