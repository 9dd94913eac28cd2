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

# what says how to train; the model reads the rest
TRAIN_KEYS = (
    "loss_weights", "sources", "names", "preference", "image_labels", "image_boxes", "audio_labels",
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


def slot_bucket(count: int, layout: Layout) -> int:
    """Image slots: the next power of two; of native-resolution patches whole blocks, of which every power of two is
    divided into four sizes."""
    if layout.patches is None:
        return count_bucket(count)
    blocks = -(-count // layout.patches.block)
    step = 1 << max(blocks.bit_length() - 3, 0)
    return -(-blocks // step) * step * layout.patches.block


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
        images=slot_bucket(max([images, *(e.num_images for e in examples)]), layout),
        audio=count_bucket(max([audio, *(e.num_audio for e in examples)])),
    )
    filled = [[e] for e in examples] + [[] for _ in range(size.rows - len(examples))]
    batch = collate(filled, size, layout, {e.source: 0 for e in examples})
    return {key: array for key, array in batch.items() if key not in TRAIN_KEYS}


TOKEN_KEYS = ("tokens", "segment_ids", "positions", "media_index", "media_taps", "tap_weights", "blocks")


def left_aligned(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with the padding of each row moved behind its tokens."""
    order = np.argsort(np.asarray(batch["segment_ids"]) == 0, axis=1, kind="stable")
    rows = np.arange(len(order))[:, None]
    return {**batch, **{key: np.asarray(batch[key])[rows, order] for key in TOKEN_KEYS if key in batch}}


def pad_batch(batch: dict[str, np.ndarray], layout: Layout) -> dict[str, np.ndarray]:
    """A batch of one conversation a row with rows, length and media slots rounded up to listed sizes."""
    batch = {key: np.asarray(value) for key, value in batch.items() if key not in TRAIN_KEYS}
    rows, length = batch["tokens"].shape
    pictures = {name for name, _, _ in layout.image_arrays} | {"image_segment_ids"}
    images = max((batch[name].shape[1] for name in pictures if name in batch), default=0)
    features = layout.image_features(images)
    shift = layout.image_features(slot_bucket(images, layout)) - features
    index = batch["media_index"]
    # clips come after the picture slots, so more slots move them
    batch["media_index"] = np.where(index >= features, index + shift, index)
    fills = {"tokens": layout.pad_id, "media_index": -1}
    padded = {}
    for key, array in batch.items():
        if key in TOKEN_KEYS:
            second = length_bucket(length)
        else:
            second = slot_bucket(images, layout) if key in pictures else count_bucket(array.shape[1])
        widths = [(0, count_bucket(rows) - rows), (0, second - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
        padded[key] = np.pad(array, widths, constant_values=fills.get(key, 0))
    return padded


def tail_of(example: Example, start: int, layout: Layout) -> Example:
    """The tokens of an example from `start` on, with only the media that they use.

    Used to go on from a KV cache that already holds the first `start` tokens.
    """

    def used(index: np.ndarray, tokens: int, merge: int, arrays: dict[str, np.ndarray]) -> tuple:
        taken = index[index >= 0]
        count = len(next(iter(arrays.values())))
        first = int(taken.min()) * merge // tokens if len(taken) else count
        for name, array in arrays.items():
            if name.endswith("segment_ids") and first < count:  # slots of one picture see each other
                first = int(np.flatnonzero(array == array[first])[0])
        moved = np.where(index >= 0, index - first * tokens // merge, index)
        return moved, {name: array[first:] for name, array in arrays.items()}

    image_index, pictures = used(
        example.image_index[start:],
        layout.image_tokens if layout.patches is None else 1,
        1 if layout.patches is None else layout.patches.merge**2,
        example.image_arrays,
    )
    clips = {"values": example.audio_values, "frames": example.audio_frames}
    audio_index, clips = used(example.audio_index[start:], layout.audio_tokens, 1, clips)
    return dataclasses.replace(
        example,
        tokens=example.tokens[start:],
        loss_weights=example.loss_weights[start:],
        segments=example.segments[start:],
        positions=example.positions[start:],
        taps=None if example.taps is None else tuple(array[start:] for array in example.taps),
        image_index=image_index,
        audio_index=audio_index,
        pixel_values=pictures.get("pixel_values", example.pixel_values),
        slots=pictures if example.slots else {},
        audio_values=clips["values"],
        audio_frames=clips["frames"],
    )
