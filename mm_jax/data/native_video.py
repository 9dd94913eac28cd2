"""Videos of any size to patches (reference: Qwen2VLVideoProcessor and Qwen3VLVideoProcessor).

Frames are resized with Pillow here and by torch there, so pixels differ a little; which frames, sizes and times do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_jax.data.native_pixels import fitting_size, patchify, pixel_bounds
from mm_jax.data.patches import Grid
from mm_jax.data.pixels import PixelRule, resize
from mm_jax.errors import UserError

RATE = 24.0  # frames a second of a video that does not say


@dataclass(frozen=True)
class NativeVideo:
    """From videos to patches, with the settings of a checkpoint.

    Attributes:
      rule: filter and normalisation.
      bounds: fewest and most pixels, of a frame or, with `shared`, of all frames together (Qwen3-VL).
      shared: also: frames are chosen evenly with both ends, not in equal steps from the first on.
      sample: choose frames; else all are taken.
      rate: frames a second that are chosen; count: or how many, whatever the length; None: not given.
      least, most: frames that are chosen, where they follow from `rate`.
      patch, frames, merge: of the tower, see `mm_jax.models.NativeViTConfig`.
    """

    rule: PixelRule
    bounds: tuple[int, int]
    shared: bool
    sample: bool
    rate: float | None
    count: int | None
    least: int
    most: int
    patch: int
    frames: int
    merge: int

    @classmethod
    def read(
        cls,
        settings: Mapping[str, Any],
        defaults: Mapping[str, Any],
        shared: bool,
        patch: int,
        frames: int,
        merge: int,
    ) -> NativeVideo:
        """From the fields of video_preprocessor_config.json, with the defaults of the reference's class."""
        values = {**defaults, **{k: v for k, v in settings.items() if v is not None}}
        return cls(
            PixelRule.read(settings, defaults),
            pixel_bounds(settings, defaults),
            shared,
            values["do_sample_frames"],
            values.get("fps"),
            values.get("num_frames"),
            values["min_frames"],
            values["max_frames"],
            patch,
            frames,
            merge,
        )

    def choose(self, total: int, rate: float | None) -> np.ndarray:
        """int [n], the frames of a video of `total` frames at `rate` Hz that are looked at.

        Raises UserError for a video that is too short.
        """
        if not self.sample:
            return np.arange(total)
        if self.shared:
            count = self.count
            if count is None and self.rate is not None:
                count = int(total / (rate or RATE) * self.rate)
                count = min(max(count, self.least), self.most, total)
            if count is None:
                count = min(max(total, self.least), self.most)
            return np.linspace(0, total - 1, count).round().astype(int)
        if self.count is not None:
            count = round(self.count / self.frames) * self.frames
        elif self.rate is not None:
            most = min(self.most, total) // self.frames * self.frames
            count = min(max(total / (rate or RATE) * self.rate, self.least), most, total)
            count = math.floor(count / self.frames) * self.frames
        else:
            return np.arange(total)
        if not 0 < count <= total:
            raise UserError(f"a video of {total} frames, of which {count} are to be looked at")
        return np.arange(0, total, total / count, dtype=np.float32)[:count].astype(int)

    def size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) that frames are resized to."""
        factor = self.patch * self.merge
        if self.rule.size is None:
            return height, width
        if not self.shared:
            return fitting_size(height, width, factor, *self.bounds)
        if frames < self.frames:
            raise UserError(f"a video of {frames} frames; at least {self.frames} are needed")
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        rounded = round(frames / self.frames) * self.frames
        return fitting_size(height, width, factor, *self.bounds, frames, rounded)

    def __call__(self, video: np.ndarray) -> tuple[np.ndarray, Grid]:
        """The chosen frames uint8 [T, H, W, 3] to patches and their grid."""
        size = self.size(*video.shape[:3])
        resized = np.stack([resize(frame, size, self.rule.resample) for frame in video])
        return patchify(self.rule.normalise(resized), self.patch, self.frames, self.merge)


def patch_times(indices: Sequence[int], rate: float, frames: int) -> list[float]:
    """Seconds in the middle of the frames of each patch; `indices` are frames of a video at `rate` Hz (Qwen3-VL)."""
    indices = [*indices, *[indices[-1]] * (-len(indices) % frames)]
    return [(indices[k] + indices[k + frames - 1]) / rate / 2 for k in range(0, len(indices), frames)]
