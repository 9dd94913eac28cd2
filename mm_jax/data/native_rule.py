"""Pictures and videos of any size: from the arrays of the reference's processors to those of the tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mm_jax.data.media_rule import Item, MediaRule, Settings
from mm_jax.data.patches import Medium, PatchLayout, positions, slots
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
      layout: of the tower; values: of a patch.
      axes: whether the decoder has M-RoPE.
      positions_per_second: how far its time moves within a second of video; 0: by one from each frame to the next.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        tokens: Mapping[str, int | None],
        layout: PatchLayout,
        values: int,
        axes: bool,
        positions_per_second: float = 0.0,
    ):
        super().__init__(settings)
        self.tokens = {kind: token for kind, token in tokens.items() if token is not None}
        self.names = {kind: VALUES[kind] for kind in self.tokens}
        if "video" in self.names:
            self.names["video"] += ("second_per_grid_ts",)
        self.layout, self.values, self.axes = layout, values, axes
        self.positions_per_second = positions_per_second

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        values, grids = VALUES[kind]
        if values not in arrays or grids not in arrays:
            raise UserError(f"{values} and {grids} belong together; one of them is missing")
        patches, thw = arrays[values], arrays[grids]
        if thw.ndim != 2 or thw.shape[1] != 3:
            raise UserError(f"{grids} has shape {list(thw.shape)}, [media, 3] is needed")
        needed = (int(thw.prod(axis=1).sum()), self.values)
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
