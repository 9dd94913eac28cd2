"""Batches from the arrays that the reference's processor returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.data.packing import Layout
from mm_jax.errors import UserError, nearest
from mm_jax.models import MultimodalConfig

KNOWN = ("input_ids", "attention_mask", "pixel_values")
# which tokens are pictures: we look at the ids
REDUNDANT = ("token_type_ids", "mm_token_type_ids")


def layout_of(config: MultimodalConfig, pad_id: int | None, stop_ids: Sequence[int]) -> Layout:
    """Media slots and padding: the pad token, or else the first stop token as in the reference's `generate`, or 0."""
    vision = config.vision
    pad = next((i for i in (pad_id, *stop_ids) if i is not None), 0)
    return Layout(
        image_tokens=config.image_tokens,
        image_size=(0, 0) if vision is None else (vision.height, vision.width),
        pad_id=pad if 0 <= pad < config.decoder.vocab_size else 0,
    )


def batch_of(
    config: MultimodalConfig, image_token_id: int | None, arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """A batch for `MultimodalLM` whose logits are aligned with input_ids.

    Args:
      arrays: input_ids int [B, S]; attention_mask [B, S], 0 for padding on either side; pixel_values [n, 3, H, W], the
        pictures in the order of their tokens in the rows.

    Raises UserError: unknown names, shapes that disagree, tokens outside the vocabulary, or pictures whose number is
    not that of their tokens.
    """
    for name in arrays:
        if name not in KNOWN + REDUNDANT:
            raise UserError(f'a batch of this model takes no "{name}"{nearest(name, KNOWN)}')
    if "input_ids" not in arrays:
        raise UserError("a batch of arrays needs at least input_ids [B, S]")
    ids = np.asarray(arrays["input_ids"])
    if ids.ndim != 2:
        raise UserError(f"input_ids has shape {list(ids.shape)}, [rows, length] is needed")
    real = np.asarray(arrays.get("attention_mask", np.ones_like(ids))).astype(bool)
    if real.shape != ids.shape:
        raise UserError(f"attention_mask has shape {list(real.shape)}, input_ids {list(ids.shape)}")
    vocab = config.decoder.vocab_size
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
        raise UserError(f"input_ids holds {ids.min()} to {ids.max()}, the vocabulary has 0 to {vocab - 1}")
    batch = {
        "tokens": ids.astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "positions": np.where(real, np.cumsum(real, axis=1) - 1, 0).astype(np.int32),
        "media_index": np.full(ids.shape, -1, np.int32),
    }
    pixels = arrays.get("pixel_values")
    pictured = ids == image_token_id if image_token_id is not None else np.zeros_like(real)
    if pixels is not None:
        if config.vision is None:
            raise UserError("there are pixel_values, but this model has no vision encoder")
        batch |= _pictures(config, pictured, np.asarray(pixels))
    elif pictured.any():
        raise UserError(f"{pictured.sum()} image tokens in input_ids, but there are no pixel_values")
    return batch


def check_pixels(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """[n, 3, H, W] -> [n, H, W, 3]. Raises UserError for pictures of another size."""
    if pixels.ndim != 4 or pixels.shape[1:] != (3, height, width):
        raise UserError(
            f"pixel_values has shape {list(pixels.shape)}, [pictures, 3, {height}, {width}] is needed"
        )
    return np.ascontiguousarray(rearrange(pixels, "n c h w -> n h w c"))


def _pictures(config: MultimodalConfig, pictured: np.ndarray, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Each row's pictures in its own slots, and the feature that each image token takes."""
    pixels = check_pixels(pixels, config.vision.height, config.vision.width)
    each, tokens = config.image_tokens, pictured.sum(axis=1)
    if tokens.sum() != len(pixels) * each or (tokens % each).any():
        raise UserError(
            f"{len(pixels)} pictures have {each} tokens each, but the rows of input_ids have {tokens.tolist()} "
            "image tokens"
        )
    counts = tokens // each
    slots = np.zeros((len(pictured), counts.max(initial=0), *pixels.shape[1:]), pixels.dtype)
    for row, (count, end) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
        slots[row, :count] = pixels[end - count : end]
    index = np.where(pictured, np.cumsum(pictured, axis=1) - 1, -1)
    return {"pixel_values": slots, "media_index": index.astype(np.int32)}
