"""Pictures and videos of any size: from the arrays of the reference's processors to those of the tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mm_jax.data.box_text import BoxText
from mm_jax.data.image import Transform
from mm_jax.data.media_rule import Arrays, Item, MediaRule, Settings
from mm_jax.data.messages import Box, Part
from mm_jax.data.native_pixels import NativePixels, pixel_bounds
from mm_jax.data.patches import Medium, PatchLayout, positions, slots
from mm_jax.data.pixels import PixelRule
from mm_jax.errors import UserError

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
      defaults: of the reference's image processor.
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
        defaults: Mapping[str, Any],
        boxes: BoxText,
    ):
        super().__init__(settings)
        self.tokens = {kind: token for kind, token in tokens.items() if token is not None}
        self.names = {kind: VALUES[kind] for kind in self.tokens}
        if "video" in self.names:
            self.names["video"] += ("second_per_grid_ts",)
        self.layout, self.patch, self.frames, self.axes = layout, patch, frames, axes
        self.defaults, self.boxes = defaults, boxes
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

    def transform(self, size: tuple[int, int]) -> Transform:
        rows, columns = self.pixels.size(size[1], size[0])
        return Transform(size, (columns / size[0], rows / size[1]), (0, 0), (columns, rows))

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
        found = []
        for part, grid, step in zip(parts, thw, steps, strict=True):
            medium = Medium(part, tuple(map(int, grid)), step)
            placed, index = slots(medium, self.layout)
            features = len(placed["patches"]) // self.layout.merge**2
            found.append(NativeItem(index, features, placed, medium=medium))
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
