"""Pictures whose encoder reads the instruction too: InstructBLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mm_jax.data.media_rule import FixedImage, Item, Settings
from mm_jax.data.messages import BadSample
from mm_jax.data.pretrained_tokenizer import PretrainedTokenizer
from mm_jax.errors import UserError


class InstructedImage(FixedImage):
    """`FixedImage` with the token ids of an instruction beside each picture.

    Pictures stand before the token that begins a text, which is tokenised without them, and a second time by the
    tokenizer in the directory qformer_tokenizer.

    Args:
      vocab, longest: of the instructions.
    """

    pieces = "every"
    placeholders = {"image": "<image>"}
    names = {"image": ("pixel_values", "qformer_input_ids", "qformer_attention_mask")}

    def __init__(self, settings: Settings, *, vocab: int, longest: int, **fixed: Any):
        super().__init__(settings, **fixed)
        self.vocab, self.longest = vocab, longest

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        if "pixel_values" not in arrays:
            raise UserError("there are instructions for pictures, but no pixel_values")
        items = super().items(kind, {"pixel_values": arrays["pixel_values"]}, counts)
        if not len(counts) and "qformer_input_ids" not in arrays:  # see `told`
            return items
        found = self._instructions(arrays, len(items))
        return [
            replace(item, arrays=item.arrays | {"instructions": row[None]})
            for item, row in zip(items, found, strict=True)
        ]

    @cached_property
    def tokenizer(self) -> PretrainedTokenizer:
        """Raises UserError where the checkpoint has none for instructions."""
        return PretrainedTokenizer.load(Path(self.settings.where) / "qformer_tokenizer")

    def told(self, text: str, items: Mapping[str, Sequence[Item]]) -> Mapping[str, Sequence[Item]]:
        if not items.get("image"):
            return items
        ids = self.tokenizer.encode(text, around=True)
        if len(ids) > self.longest:
            raise BadSample(
                f"the text is {len(ids)} tokens of the Q-Former, which reads {self.longest}", "too_long"
            )
        rows = np.tile(np.array([ids]), (len(items["image"]), 1))
        found = self._instructions({"qformer_input_ids": rows}, len(rows))
        pictures = [
            replace(item, arrays=item.arrays | {"instructions": row[None]})
            for item, row in zip(items["image"], found, strict=True)
        ]
        return {**items, "image": pictures}

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
