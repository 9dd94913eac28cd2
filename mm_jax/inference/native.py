"""Pictures and videos of any size, as the reference's processors return them, in the arrays of a native-resolution
tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mm_jax.data.patches import Medium, PatchLayout, features, fill, positions, runs
from mm_jax.errors import UserError
from mm_jax.models import MultimodalConfig

# kind in `kinds` -> names of the values, of the grids, of the tokens
_NAMES = {
    1: ("pixel_values", "image_grid_thw", "image"),
    2: ("pixel_values_videos", "video_grid_thw", "video"),
}


def patch_layout(config: MultimodalConfig) -> PatchLayout:
    """How the patches of this model's tower stand in a row."""
    vision = config.vision
    return PatchLayout(vision.merge, vision.window, vision.table_side)


def native_media(
    config: MultimodalConfig,
    kinds: np.ndarray,
    real: np.ndarray,
    arrays: Mapping[str, Any],
    positions_per_second: float,
) -> dict[str, np.ndarray]:
    """Patches, media_index and positions of a batch.

    Args:
      kinds: int [B, S], 1 for the tokens of pictures, 2 for those of videos.
      real: bool [B, S], False for padding.
      arrays, positions_per_second: see `mm_jax.inference.arrays.batch_of`.

    Raises UserError when the media are not those of the tokens.
    """
    layout, merge = patch_layout(config), config.vision.merge
    waiting = {kind: _media(kind, arrays, config, positions_per_second) for kind in _NAMES}
    rows = [_taken(kinds[r][real[r]], waiting, layout) for r in range(len(kinds))]
    for kind, left in waiting.items():
        if left:
            raise UserError(
                f"{len(left)} more in {_NAMES[kind][1]} than {_NAMES[kind][2]} tokens in input_ids"
            )
    index = np.full(kinds.shape, -1, np.int32)
    places = np.zeros((*kinds.shape, 3), np.int32)
    for r, media in enumerate(rows):
        index[r, kinds[r] > 0] = features(media, layout)
        places[r, real[r]] = positions(kinds[r][real[r]] > 0, media, merge)
    batch = {"media_index": index}
    if config.decoder.rope_sections:
        batch["positions"] = places
    return batch | (fill(rows, layout) if any(rows) else {})


def _media(
    kind: int, arrays: Mapping[str, Any], config: MultimodalConfig, positions_per_second: float
) -> list[Medium]:
    """All pictures or all videos of a batch."""
    values, grids, _ = _NAMES[kind]
    if (values in arrays) != (grids in arrays):
        raise UserError(f"{values} and {grids} belong together; one of them is missing")
    if values not in arrays:
        return []
    patches, thw = np.asarray(arrays[values]), np.asarray(arrays[grids])
    if thw.ndim != 2 or thw.shape[1] != 3:
        raise UserError(f"{grids} has shape {list(thw.shape)}, [media, 3] is needed")
    needed = (int(thw.prod(axis=1).sum()), config.vision.patch_dim)
    if patches.shape != needed:
        raise UserError(f"{values} has shape {list(patches.shape)}, {list(needed)} is needed after {grids}")
    steps = np.ones(len(thw))
    if kind == 2 and positions_per_second:
        seconds = np.asarray(arrays.get("second_per_grid_ts", steps), np.float32)
        if seconds.shape != steps.shape:
            raise UserError(
                f"second_per_grid_ts has shape {list(seconds.shape)}, {list(steps.shape)} is needed"
            )
        steps = seconds * np.float32(positions_per_second)
    ends = np.cumsum(thw.prod(axis=1))[:-1]
    parts = np.split(patches, ends)
    return [
        Medium(part, tuple(map(int, grid)), step) for part, grid, step in zip(parts, thw, steps, strict=True)
    ]


def _taken(kinds: np.ndarray, waiting: dict[int, list[Medium]], layout: PatchLayout) -> list[Medium]:
    """The media that the tokens of one row are of, in their order; they are taken off those that wait."""
    media, left = [], {1: 0, 2: 0}
    for start, stop in runs(kinds):
        kind, count = int(kinds[start]), stop - start
        while kind and count:
            if not left[kind]:
                if not waiting[kind]:
                    values, _, name = _NAMES[kind]
                    raise UserError(f"there are more {name} tokens in input_ids than {values} have features")
                media.append(waiting[kind].pop(0))
                left[kind] = layout.num_tokens(media[-1].grid)
            used = min(count, left[kind])
            left[kind] -= used
            count -= used
    for kind, missing in left.items():
        if missing:
            raise UserError(
                f"a row of input_ids ends {missing} tokens before its last {_NAMES[kind][2]} does"
            )
    return media
