"""Examples to batches for inference: one conversation a row, shapes rounded up to a short list of sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mm_jax.data.packing import BatchConfig, Layout, collate

if TYPE_CHECKING:
    from mm_jax.data.example import Example

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)

PATCH_KEYS = (
    "patches", "patch_segment_ids", "patch_positions", "patch_table_index", "patch_table_weights",
)  # fmt: skip
# what the decoder reads; the rest of a training batch says how to train
MODEL_KEYS = (
    "tokens", "segment_ids", "positions", "media_index", "pixel_values", "image_segment_ids", "audio_values",
    "audio_frames", "audio_segment_ids", *PATCH_KEYS,
)  # fmt: skip


def length_bucket(length: int) -> int:
    """The smallest listed length that holds `length` tokens; past the list, a multiple of 4096."""
    for size in LENGTHS:
        if length <= size:
            return size
    return -(-length // 4096) * 4096


def count_bucket(count: int) -> int:
    """The next power of two, 0 for 0: sizes for rows and media slots."""
    return 0 if count == 0 else 1 << (count - 1).bit_length()


def patch_bucket(slots: int, block: int) -> int:
    """Slots for patches: a multiple of `block`, of which every power of two is divided into four sizes."""
    blocks = -(-slots // block)
    step = 1 << max(blocks.bit_length() - 3, 0)
    return -(-blocks // step) * step * block


def collate_prompts(
    examples: Sequence[Example],
    layout: Layout,
    *,
    rows: int | None = None,
    length: int = 0,
    images: int = 0,
    audio: int = 0,
) -> dict[str, np.ndarray]:
    """One example a row, right-padded.

    Args:
      rows: rows of the batch; those after the examples are all padding. None for as many as examples.
      length, images, audio: sizes wanted at least; rounded up to the listed ones.

    Returns:
      The batch of `mm_jax.data.example` without loss weights; media arrays are absent where no row has media.
    """
    size = BatchConfig(
        rows=rows or len(examples),
        length=length_bucket(max([length, *(e.length for e in examples)])),
        images=count_bucket(max([images, *(e.num_images for e in examples)])),
        audio=count_bucket(max([audio, *(e.num_audio for e in examples)])),
    )
    filled = [[e] for e in examples] + [[] for _ in range(size.rows - len(examples))]
    batch = collate(filled, size, layout, {e.source: 0 for e in examples})
    return {key: batch[key] for key in MODEL_KEYS if key in batch}


TOKEN_KEYS = ("tokens", "segment_ids", "positions", "media_index")


def left_aligned(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with the padding of each row moved behind its tokens."""
    order = np.argsort(np.asarray(batch["segment_ids"]) == 0, axis=1, kind="stable")
    rows = np.arange(len(order))[:, None]
    moved = {key: np.asarray(batch[key])[rows, order] for key in TOKEN_KEYS if key in batch}
    return {**batch, **moved}


def pad_batch(batch: dict[str, np.ndarray], layout: Layout) -> dict[str, np.ndarray]:
    """A batch of one conversation a row with rows, length and media slots rounded up to listed sizes."""
    batch = {key: np.asarray(batch[key]) for key in MODEL_KEYS if key in batch}
    rows, length = batch["tokens"].shape
    sizes = dict.fromkeys(TOKEN_KEYS, length_bucket(length))
    if "patches" in batch:
        before = batch["patches"].shape[1]
        after = patch_bucket(before, layout.patches.block)
        sizes |= dict.fromkeys(PATCH_KEYS, after)
        each = layout.patches.merge**2
        before, after = before // each, after // each
    else:
        images = batch["pixel_values"].shape[1] if "pixel_values" in batch else 0
        before, after = (n * layout.image_tokens for n in (images, count_bucket(images)))
    index = batch["media_index"]
    # clips come after the pictures, so more room for those moves them
    batch["media_index"] = np.where(index >= before, index + after - before, index)
    fills = {"tokens": layout.pad_id, "media_index": -1}
    padded = {}
    for key, array in batch.items():
        second = sizes[key] if key in sizes else count_bucket(array.shape[1])
        widths = [(0, count_bucket(rows) - rows), (0, second - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
        padded[key] = np.pad(array, widths, constant_values=fills.get(key, 0))
    return padded


def tail_of(example: Example, start: int, layout: Layout) -> Example:
    """The tokens of an example from `start` on, with only the media that they use.

    Used to go on from a KV cache that already holds the first `start` tokens.
    """

    def used(index: np.ndarray, tokens: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        taken = index[index >= 0]
        first = int(taken.min()) // tokens if len(taken) else len(arrays[0])
        return (np.where(index >= 0, index - first * tokens, -1), *(array[first:] for array in arrays))

    image_index, pixels = used(example.image_index[start:], layout.image_tokens, example.pixel_values)
    audio_index, values, frames = used(
        example.audio_index[start:], layout.audio_tokens, example.audio_values, example.audio_frames
    )
    return dataclasses.replace(
        example,
        tokens=example.tokens[start:],
        loss_weights=example.loss_weights[start:],
        segments=example.segments[start:],
        positions=example.positions[start:],
        image_index=image_index,
        audio_index=audio_index,
        pixel_values=pixels,
        audio_values=values,
        audio_frames=frames,
    )
