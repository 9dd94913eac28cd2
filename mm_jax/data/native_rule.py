"""Pictures and videos of any size: from the arrays of the reference's processors to those of the tower."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from mm_jax.data.box_text import BoxText
from mm_jax.data.image import Transform
from mm_jax.data.media_rule import MEDIA, Arrays, Item, MediaRule, Settings
from mm_jax.data.messages import Box, Part
from mm_jax.data.native_pixels import NativePixels, largest_area, pixel_bounds
from mm_jax.data.native_video import RATE, NativeVideo, patch_times
from mm_jax.data.patches import Medium, PatchLayout, positions, slots
from mm_jax.data.pixels import PixelRule
from mm_jax.errors import UserError

START, END = "<|vision_start|>", "<|vision_end|>"
VALUES = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


@dataclass(frozen=True)
class NativeItem(Item):
    """An `Item` that knows its grid, from which positions follow."""

    medium: Medium | None = None


class NativeRule(MediaRule):
    """Patches of pictures and videos with their grids (Qwen2-VL).

    Args:
      tokens: see `MediaRule`; None for a kind that the system does not take.
      layout: of the tower; patch: pixels of a patch's side; frames: pictures that it spans in time.
      axes: whether the decoder has M-RoPE.
      positions_per_second: how far its time moves within a second of video; 0: by one from each frame to the next.
      defaults, video_defaults: of the reference's image and video processor.
      timed: videos as of Qwen3-VL: each frame of the grid stands behind its time and between markers of its own, and
        frames and sizes are chosen for the video as a whole.
      boxes: how the system writes boxes.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        tokens: Mapping[str, int | None],
        layout: PatchLayout,
        patch: int,
        frames: int,
        axes: bool,
        positions_per_second: float = 0.0,
        timed: bool = False,
        defaults: Mapping[str, Any],
        video_defaults: Mapping[str, Any],
        boxes: BoxText,
    ):
        super().__init__(settings)
        self.tokens = {kind: token for kind, token in tokens.items() if token is not None}
        self.names = {kind: VALUES[kind] for kind in self.tokens}
        if "video" in self.names:
            self.names["video"] += ("second_per_grid_ts",)
        self.opening = boxes.begun
        self.layout, self.patch, self.frames, self.axes = layout, patch, frames, axes
        self.defaults, self.video_defaults, self.timed, self.boxes = defaults, video_defaults, timed, boxes
        if timed:
            self.names["video"] += ("video_times",)
            self.placeholders = {"video": f"{START}<|video_pad|>{END}"}
        self.positions_per_second = positions_per_second

    @cached_property
    def pixels(self) -> NativePixels:
        """Raises UserError where the checkpoint does not say how to prepare pictures."""
        settings = self.settings.need("image")
        rule, bounds = PixelRule.read(settings, self.defaults), pixel_bounds(settings, self.defaults)
        return NativePixels(rule, bounds, self.patch, self.frames, self.layout.merge)

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        patches, grids = zip(*map(self.pixels.picture, images), strict=True)
        return {"pixel_values": np.concatenate(patches), "image_grid_thw": np.array(grids, np.int64)}

    @cached_property
    def video_pixels(self) -> NativeVideo:
        """Old checkpoints have one file of settings for pictures and videos."""
        settings = self.settings.video or self.settings.need("image")
        sizes = (self.patch, self.frames, self.layout.merge)
        return NativeVideo.read(settings, self.video_defaults, self.timed, *sizes)

    def videos(self, videos: Sequence[tuple[np.ndarray, float | None]]) -> Arrays:
        """Besides the reference's arrays "video_times", the seconds of every frame of the grids, where they are written
        in the text."""
        patches, grids, seconds, times = [], [], [], []
        for frames, rate in videos:
            chosen = self.video_pixels.choose(len(frames), rate)
            values, grid = self.video_pixels(frames[chosen])
            patches.append(values)
            grids.append(grid)
            seconds.append(self.frames / (len(chosen) / len(frames) * rate if rate else RATE))
            times += patch_times(chosen.tolist(), rate or RATE, self.frames)
        arrays = {"pixel_values_videos": np.concatenate(patches), "video_grid_thw": np.array(grids, np.int64)}
        if self.positions_per_second:
            arrays["second_per_grid_ts"] = np.array(seconds, np.float32)
        if self.timed:
            arrays["video_times"] = np.array(times)
        return arrays

    def spans(self, longest: int) -> Iterable[int]:
        """Patches of a picture or frame."""
        if self.settings.image is None:
            return ()
        frames = [self.video_pixels] if "video" in self.tokens else []
        most = longest * self.layout.merge**2
        if all(each.rule.size is not None for each in (self.pixels, *frames)):
            pixels = max(
                largest_area(each.bounds, self.patch * self.layout.merge) for each in (self.pixels, *frames)
            )
            most = min(most, pixels // self.patch**2)
        return range(self.layout.block, self.layout.most_slots(most) + 1, self.layout.block)

    def transform(self, size: tuple[int, int]) -> Transform:
        rows, columns = self.pixels.size(size[1], size[0])
        return Transform(size, (columns / size[0], rows / size[1]), (0, 0), (columns, rows))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = self.pixels.size(size[1], size[0])
        side = self.patch * self.layout.merge
        return height // side, width // side

    def write_box(self, box: Box, transform: Transform) -> str:
        return self.boxes.write(box, transform)

    def parse(self, text: str, transforms: Sequence[Transform]) -> list[Part]:
        return self.boxes.parse(text, transforms)

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        values, grids = VALUES[kind]
        if values not in arrays or grids not in arrays:
            raise UserError(f"{values} and {grids} belong together; one of them is missing")
        patches, thw = arrays[values], arrays[grids]
        if thw.ndim != 2 or thw.shape[1] != 3:
            raise UserError(f"{grids} has shape {list(thw.shape)}, [media, 3] is needed")
        needed = (int(thw.prod(axis=1).sum()), 3 * self.frames * self.patch**2)
        if patches.shape != needed:
            raise UserError(
                f"{values} has shape {list(patches.shape)}, {list(needed)} is needed after {grids}"
            )
        steps = self._steps(arrays, len(thw)) if kind == "video" else np.ones(len(thw))
        parts = np.split(patches, np.cumsum(thw.prod(axis=1))[:-1])
        times = iter(arrays.get("video_times", ()))
        found = []
        for part, grid, step in zip(parts, thw, steps, strict=True):
            medium = Medium(part, tuple(map(int, grid)), step)
            placed, index = slots(medium, self.layout)
            features = len(placed["patches"]) // self.layout.merge**2
            each = len(index) // medium.grid[0]
            frames = [
                f"<{time:.1f} seconds>{START}{MEDIA * each}{END}" for time in islice(times, medium.grid[0])
            ]
            found.append(NativeItem(index, features, placed, "".join(frames), medium=medium))
        return found

    def _steps(self, arrays: Mapping[str, np.ndarray], count: int) -> np.ndarray:
        """Positions from one frame of each video to the next."""
        steps = np.ones(count)
        if not self.positions_per_second:
            return steps
        seconds = np.asarray(arrays.get("second_per_grid_ts", steps), np.float32)
        if seconds.shape != steps.shape:
            raise UserError(
                f"second_per_grid_ts has shape {list(seconds.shape)}, {list(steps.shape)} is needed"
            )
        return seconds * np.float32(self.positions_per_second)

    def positions(self, tokens: np.ndarray, items: Mapping[str, Sequence[Item]]) -> np.ndarray:
        if not self.axes:
            return super().positions(tokens, items)
        pictured = np.isin(tokens, list(self.tokens.values()))
        media = []
        for kind, token in self.tokens.items():
            places = np.flatnonzero(tokens == token)
            found = items.get(kind, ())
            starts = np.cumsum([0] + [len(item.index) for item in found])[:-1]
            media += [(int(places[start]), item.medium) for item, start in zip(found, starts, strict=True)]
        media.sort(key=lambda entry: entry[0])
        return positions(pictured, [medium for _, medium in media], self.layout.merge)
