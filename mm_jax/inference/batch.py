"""Examples to batches for inference: one conversation a row, shapes rounded up to a short list of sizes."""

from __future__ import annotations

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


FINE = 1024  # patches beyond which there is a size between every two powers of two


def span_bucket(count: int, layout: Layout) -> int:
    """Image slots of one picture or frame that is encoded as a whole: each size is a program to compile, so there are
    fewer than in `slot_bucket`."""
    if layout.patches is None:
        return count_bucket(count)
    block = layout.patches.block
    blocks = count_bucket(-(-count // block))
    between = blocks // 4 * 3 * block
    return between if blocks * block > FINE and count <= between else blocks * block


def collate_prompts(examples: Sequence[Example], layout: Layout) -> dict[str, np.ndarray]:
    """One example a row, right-padded; length and media slots are rounded up to listed sizes.

    Returns:
      The batch of `mm_jax.data.example` without loss weights; media arrays are absent where no row has media.
    """
    size = BatchConfig(
        rows=len(examples),
        length=length_bucket(max(e.length for e in examples)),
        images=slot_bucket(max(e.num_images for e in examples), layout),
        audio=count_bucket(max(e.num_audio for e in examples)),
    )
    batch = collate([[e] for e in examples], size, layout, {e.source: 0 for e in examples})
    return {key: array for key, array in batch.items() if key not in TRAIN_KEYS}


TOKEN_KEYS = (
    "tokens",
    "segment_ids",
    "positions",
    "media_index",
    "media_taps",
    "tap_weights",
    "blocks",
    "seen",
)
