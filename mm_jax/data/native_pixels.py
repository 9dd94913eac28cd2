"""Pictures and videos of any size to patches, as the image and video processors of Qwen2-VL and Qwen3-VL make them.

Reference: Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor. Frames are resized with Pillow here,
by torch there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.data.patches import Grid
from mm_jax.data.pixels import PixelRule, resize
from mm_jax.errors import UserError

MAX_ASPECT = 200


def fitting_size(
    height: int, width: int, factor: int, least: int, most: int, frames: float = 1, rounded_frames: int = 1
) -> tuple[int, int]:
    """(height, width) near those given whose sides are multiples of `factor`.

    Args:
      least, most: pixels of the result, all frames together.
      frames, rounded_frames: of a video whose pixels count together, as they are and as multiples of a patch's.

    Raises UserError for pictures that are more than 200 times as long as they are wide.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(
            f"a picture of {width} x {height} is more than {MAX_ASPECT} times as long as it is wide"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rounded_frames * rows * columns > most:
        shrink = math.sqrt(frames * height * width / most)
        rows, columns = (max(factor, math.floor(n / shrink / factor) * factor) for n in (height, width))
    elif rounded_frames * rows * columns < least:
        grow = math.sqrt(least / (frames * height * width))
        rows, columns = (math.ceil(n * grow / factor) * factor for n in (height, width))
    return rows, columns


def fitting_video_size(
    frames: int, height: int, width: int, factor: int, least: int, most: int, per_patch: int
) -> tuple[int, int]:
    """`fitting_size` where all frames share one budget, and sides under `factor` are enlarged first (Qwen3-VL)."""
    if frames < per_patch:
        raise UserError(f"a video of {frames} frames; at least {per_patch} are needed")
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rounded = round(frames / per_patch) * per_patch
    return fitting_size(height, width, factor, least, most, frames, rounded)


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


def sample_evenly(total: int, count: int) -> np.ndarray:
    """int [count] frames of `total`, both ends among them (Qwen3-VL)."""
    return np.linspace(0, total - 1, count).round().astype(int)


def sample_steps(total: int, count: int) -> np.ndarray:
    """int [count] frames of `total`, in equal steps from the first on (Qwen2-VL)."""
    return np.arange(0, total, total / count, dtype=np.float32)[:count].astype(int)


def num_frames(total: int, rate: float, wanted: float, least: int, most: int, per_patch: int = 1) -> int:
    """How many frames of a video of `total` frames at `rate` Hz are looked at, when `wanted` Hz are asked for.

    With per_patch above 1 the number is a multiple of it (Qwen2-VL).
    """
    most = min(most, total) // per_patch * per_patch
    count = total / rate * wanted
    count = min(max(count if per_patch > 1 else int(count), least), most, total)
    return math.floor(count / per_patch) * per_patch


def patch_times(indices: Sequence[int], rate: float, per_patch: int) -> list[float]:
    """Seconds in the middle of the frames of each patch; `indices` are frames of a video at `rate` Hz (Qwen3-VL)."""
    indices = [*indices, *[indices[-1]] * (-len(indices) % per_patch)]
    times = [index / rate for index in indices]
    return [(times[k] + times[k + per_patch - 1]) / 2 for k in range(0, len(times), per_patch)]


@dataclass(frozen=True)
class NativePixels:
    """From pictures and videos to patches, with the settings of a checkpoint.

    Attributes:
      rule: filter and normalisation of pictures; of videos: video_rule.
      bounds: fewest and most pixels of a picture; of videos: video_bounds, of a frame or, with shared_bounds, of all
        frames together.
      patch, frames, merge: of the tower, see `mm_jax.models.NativeViTConfig`.
    """

    rule: PixelRule
    bounds: tuple[int, int]
    video_rule: PixelRule
    video_bounds: tuple[int, int]
    shared_bounds: bool
    patch: int
    frames: int
    merge: int

    @property
    def factor(self) -> int:
        """Sides of resized pictures are multiples of this."""
        return self.patch * self.merge

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture is resized to."""
        if self.rule.size is None:
            return height, width
        return fitting_size(height, width, self.factor, *self.bounds)

    def video_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) that frames are resized to."""
        if self.video_rule.size is None:
            return height, width
        if self.shared_bounds:
            return fitting_video_size(frames, height, width, self.factor, *self.video_bounds, self.frames)
        return fitting_size(height, width, self.factor, *self.video_bounds)

    def picture(self, picture: np.ndarray) -> tuple[np.ndarray, Grid]:
        """uint8 [H, W, 3] to patches and their grid."""
        resized = resize(picture, self.size(*picture.shape[:2]), self.rule.resample)
        return patchify(self.rule.normalise(resized)[None], self.patch, self.frames, self.merge)

    def video(self, video: np.ndarray) -> tuple[np.ndarray, Grid]:
        """uint8 [T, H, W, 3] to patches and their grid."""
        size = self.video_size(*video.shape[:3])
        resized = np.stack([resize(frame, size, self.video_rule.resample) for frame in video])
        return patchify(self.video_rule.normalise(resized), self.patch, self.frames, self.merge)


def pixel_bounds(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[int, int]:
    """Fewest and most pixels that the settings of an image or video processor ask for."""
    size = {**defaults["size"], **(settings.get("size") or {})}
    return settings.get("min_pixels") or size["shortest_edge"], settings.get("max_pixels") or size[
        "longest_edge"
    ]
