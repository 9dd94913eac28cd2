"""Pictures of any size to patches (reference: Qwen2VLImageProcessorPil)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.data.patches import Grid
from mm_jax.data.pixels import PixelRule, resize
from mm_jax.errors import UserError

MAX_ASPECT = 200


def fitting_size(
    height: int, width: int, factor: int, least: int, most: int, frames: int = 1, rounded: int = 1
) -> tuple[int, int]:
    """(height, width) near those given whose sides are multiples of `factor`.

    Args:
      least, most: pixels of the result.
      frames, rounded: of a video whose pixels count together: their number, and that of whole patches.

    Raises UserError for pictures that are more than 200 times as long as they are wide.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"a picture of {width} x {height} is more than {MAX_ASPECT} times as long as it is wide"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rounded * rows * columns > most:
        shrink = math.sqrt(frames * height * width / most)
        rows, columns = (max(factor, math.floor(n / shrink / factor) * factor) for n in (height, width))
    elif rounded * rows * columns < least:
        grow = math.sqrt(least / (frames * height * width))
        rows, columns = (math.ceil(n * grow / factor) * factor for n in (height, width))
    return rows, columns


def largest_area(bounds: tuple[int, int], factor: int) -> int:
    """No fewer pixels than `fitting_size` gives of any picture: it rounds sides, thin ones up to `factor`."""
    least, most = bounds
    longest = math.ceil(math.sqrt(MAX_ASPECT * max(least, most)))
    return max(most, least + 2 * factor * longest)


def patchify(frames: np.ndarray, patch: int, per_patch: int, merge: int) -> tuple[np.ndarray, Grid]:
    """Frames float32 [T, H, W, 3] to patches [P, 3 * per_patch * patch * patch] and their grid.

    The last frame is repeated until their number is a multiple of `per_patch`: a picture is a video that stands still.
    """
    missing = -len(frames) % per_patch
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    times, rows, columns = len(frames) // per_patch, frames.shape[1] // patch, frames.shape[2] // patch
    patches = rearrange(
        frames,
        "(t f) (h a p) (w b q) c -> (t h w a b) (c f p q)",
        f=per_patch,
        a=merge,
        b=merge,
        p=patch,
        q=patch,
    )
    return np.ascontiguousarray(patches), (times, rows, columns)


@dataclass(frozen=True)
class NativePixels:
    """From pictures to patches, with the settings of a checkpoint.

    Attributes:
      rule: filter and normalisation.
      bounds: fewest and most pixels of a picture.
      patch, frames, merge: of the tower, see `mm_jax.models.NativeViTConfig`.
    """

    rule: PixelRule
    bounds: tuple[int, int]
    patch: int
    frames: int
    merge: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture is resized to."""
        if self.rule.size is None:
            return height, width
        return fitting_size(height, width, self.patch * self.merge, *self.bounds)

    def picture(self, picture: np.ndarray) -> tuple[np.ndarray, Grid]:
        """uint8 [H, W, 3] to patches and their grid."""
        resized = resize(picture, self.size(*picture.shape[:2]), self.rule.resample)
        return patchify(self.rule.normalise(resized)[None], self.patch, self.frames, self.merge)


def pixel_bounds(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[int, int]:
    """Fewest and most pixels that the settings of an image or video processor ask for."""
    size = {**defaults["size"], **(settings.get("size") or {})}
    return settings.get("min_pixels") or size["shortest_edge"], settings.get("max_pixels") or size[
        "longest_edge"
    ]
