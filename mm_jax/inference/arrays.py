"""Batches from the arrays that the reference's processor returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.data.packing import Layout
from mm_jax.errors import UserError, nearest
from mm_jax.inference.native import native_media, patch_layout
from mm_jax.models import MultimodalConfig

KNOWN = ("input_ids", "attention_mask", "position_ids", "pixel_values")
NATIVE = ("image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
# which tokens are pictures: we look at the ids
REDUNDANT = ("token_type_ids", "mm_token_type_ids")


def layout_of(config: MultimodalConfig, pad_id: int | None, stop_ids: Sequence[int]) -> Layout:
    """Media slots and padding: the pad token, or else the first stop token as in the reference's `generate`, or 0."""
    vision = config.vision
    pad = next((i for i in (pad_id, *stop_ids) if i is not None), 0)
    return Layout(
        image_tokens=config.image_tokens,
        image_size=(0, 0) if vision is None or config.native else (vision.height, vision.width),
        patches=patch_layout(config) if config.native else None,
        pad_id=pad if 0 <= pad < config.decoder.vocab_size else 0,
    )


def batch_of(
    config: MultimodalConfig,
    arrays: Mapping[str, Any],
    image_token_id: int | None = None,
    video_token_id: int | None = None,
    positions_per_second: float = 0.0,
) -> dict[str, np.ndarray]:
    """A batch for `MultimodalLM` whose logits are aligned with input_ids.

    Args:
      arrays: input_ids int [B, S]; attention_mask [B, S], 0 for padding on either side; pixel_values [n, 3, H, W], the
        pictures in the order of their tokens in the rows; position_ids [B, S], or [3, B, S] for M-RoPE, in place of
        those that follow from the other arrays. For a native-resolution tower instead pixel_values [patches, values]
        with image_grid_thw [n, 3], and the same of videos with second_per_grid_ts [m].
      image_token_id, video_token_id, positions_per_second: as of `mm_jax.families.System`.

    Raises UserError: unknown names, shapes that disagree, tokens outside the vocabulary, or pictures whose number is
    not that of their tokens.
    """
    known = KNOWN + NATIVE * config.native
    for name in arrays:
        if name not in known + REDUNDANT:
            raise UserError(f'a batch of this model takes no "{name}"{nearest(name, known)}')
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
    given = {name: array for name, array in arrays.items() if array is not None}
    pictured = ids == image_token_id if image_token_id is not None else np.zeros_like(real)
    if config.native:
        kinds = np.where(pictured, 1, np.where(ids == video_token_id, 2, 0)) * real
        batch |= native_media(config, kinds, real, given, positions_per_second)
    elif "pixel_values" in given:
        if config.vision is None:
            raise UserError("there are pixel_values, but this model has no vision encoder")
        batch |= _pictures(config, pictured, np.asarray(given["pixel_values"]))
    elif pictured.any():
        raise UserError(f"{pictured.sum()} image tokens in input_ids, but there are no pixel_values")
    if "position_ids" in given:
        batch["positions"] = _positions(np.asarray(given["position_ids"]), batch["positions"].shape)
    return batch


def _positions(position_ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """As `shape` says: [B, S], or [B, S, 3] of [3, B, S] or, with those of text in front, [4, B, S]."""
    positions = position_ids.astype(np.int32)
    if len(shape) == 3 and positions.ndim == 3:
        positions = rearrange(positions[-3:], "a b s -> b s a")
    if positions.shape != shape:
        needed = list(shape) if len(shape) == 2 else [3, *shape[:2]]
        raise UserError(f"position_ids has shape {list(position_ids.shape)}, {needed} is needed")
    return positions


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
