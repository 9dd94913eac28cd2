"""Pictures in tiles, as LLaVA-NeXT and LLaVA-OneVision cut them (AnyRes), and what becomes of the tiles' features.

A picture is fitted into the best of a list of sizes, with black around it, and cut into tiles; a view of the whole,
squeezed to one tile, comes first. Of the features those of the view come first, then the tiles' as one grid, without
the rows or columns that show only black, and with a newline after each row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.data.media_rule import Arrays, Item, MediaRule, Settings
from mm_jax.data.pixels import PixelRule, pad_to_square, resize
from mm_jax.errors import UserError

Size = tuple[int, int]  # (height, width)
NEWLINE = -2  # the first of the model's markers


def best_size(size: Size, sizes: Sequence[Size]) -> Size:
    """The size that keeps the most pixels of a picture, and of equals that which adds the fewest."""

    def merit(candidate: Size) -> tuple[int, int]:
        scale = min(candidate[1] / size[1], candidate[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - candidate[0] * candidate[1]

    return max(sizes, key=merit)  # the first of equals


def fitted(size: Size, into: Size) -> Size:
    """A picture's size after it is scaled to touch two sides of `into`."""
    across, down = into[1] / size[1], into[0] / size[0]
    if across < down:
        return min(math.ceil(size[0] * across), into[0]), into[1]
    return into[0], min(math.ceil(size[1] * down), into[1])


def tiles(picture: np.ndarray, sizes: Sequence[Size], tile: int, resample: int) -> list[np.ndarray]:
    """uint8 [H, W, 3] -> tiles [tile, tile, 3], row by row."""
    target = best_size(picture.shape[:2], sizes)
    scaled = resize(picture, fitted(picture.shape[:2], target), resample)
    canvas = np.zeros((*target, 3), np.uint8)
    top, left = ((whole - part) // 2 for whole, part in zip(target, scaled.shape[:2], strict=True))
    canvas[top : top + scaled.shape[0], left : left + scaled.shape[1]] = scaled
    return list(rearrange(canvas, "(r h) (c w) d -> (r c) h w d", h=tile, w=tile))


def unpadded(size: Size, grid: Size) -> tuple[slice, slice]:
    """Rows and columns of a grid over a fitted picture that show it."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        margin = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(margin, rows - margin), slice(0, columns)
    margin = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(margin, columns - margin)


def stretch(grid: np.ndarray, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """How a grid of feature numbers [R, C] is stretched to `size` bilinearly, pixel centres on pixel centres.

    Returns:
      int32 [*size, 4], the features that each place mixes, and float32 [*size, 4], their weights.
    """

    def ends(new: int, old: int) -> tuple[np.ndarray, np.ndarray]:
        place = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * (np.float32(old) / np.float32(new))
        place = np.maximum(place - np.float32(0.5), 0)
        low = np.minimum(place.astype(np.int32), old - 1)
        share = place - low
        return np.stack([low, np.minimum(low + 1, old - 1)], -1), np.stack([1 - share, share], -1)

    (rows, down), (columns, across) = ends(size[0], grid.shape[0]), ends(size[1], grid.shape[1])
    found = grid[rows[:, None, :, None], columns[None, :, None, :]]
    weights = down[:, None, :, None] * across[None, :, None, :]
    return found.reshape(*size, 4).astype(np.int32), weights.reshape(*size, 4).astype(np.float32)


class AnyRes(MediaRule):
    """The pictures of LLaVA-NeXT, and with `most`, `together` and `video_id` those of LLaVA-OneVision.

    Args:
      token_id: that stands for a feature; video_id: for one of a video, None where there are none.
      size: side of a tile in pixels; side: in features.
      sizes: (height, width) of pixels that a picture is fitted into one of.
      defaults: of the reference's image processor.
      most: tiles' worth of features; more are scaled down. None: as many as there are.
      together: several pictures of a conversation are cut into tiles too, instead of padded to a square each.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        token_id: int,
        size: int,
        side: int,
        sizes: Sequence[Size],
        defaults: Mapping[str, Any],
        most: int | None = None,
        together: bool = True,
        video_id: int | None = None,
    ):
        super().__init__(settings)
        self.tokens = {"image": token_id}
        self.names = {"image": ("pixel_values", "image_sizes")}
        if not together:
            self.names["image"] += ("batch_num_images",)
        if video_id is not None:
            self.tokens["video"], self.names["video"] = video_id, ("pixel_values_videos",)
        self.size, self.side, self.sizes, self.defaults = size, side, tuple(sizes), defaults
        self.most, self.together = most, together
        self.taps = most is not None or video_id is not None

    @cached_property
    def rule(self) -> PixelRule:
        return PixelRule.read(dict(self.settings.need("image")) | {"do_pad": False}, self.defaults)

    @cached_property
    def processor_sizes(self) -> tuple[Size, ...]:
        """Those of the image processor; the model's config should say the same."""
        found = self.settings.need("image").get("image_grid_pinpoints")
        return self.sizes if found is None else tuple(map(tuple, found))

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        return self._images(images, [1] * len(images))

    def conversation_images(self, images: Sequence[np.ndarray]) -> Arrays:
        return self._images(images, [1] * len(images) if self.together else [len(images)])

    def _images(self, images: Sequence[np.ndarray], groups: Sequence[int]) -> Arrays:
        rule, made = self.rule, []
        square = tuple(int(m * 255) for m in rule.mean or (0, 0, 0))
        for image, cut in zip(images, _cut(groups), strict=True):
            if cut:
                view = resize(image, (self.size, self.size), rule.resample)
                views = [view, *tiles(image, self.processor_sizes, self.size, rule.resample)]
            else:
                views = [pad_to_square(image, square)]
            made.append(np.stack([rule(view).transpose(2, 0, 1) for view in views]))
        most = max(map(len, made))
        pixels = np.zeros((len(made), most, *made[0].shape[1:]), np.float32)
        for k, views in enumerate(made):
            pixels[k, : len(views)] = views
        arrays = {"pixel_values": pixels, "image_sizes": np.array([image.shape[:2] for image in images])}
        return arrays if self.together else arrays | {"batch_num_images": np.array(groups)}

    @cached_property
    def video_rule(self) -> PixelRule:
        settings = self.settings.video or self.settings.need("image")
        return PixelRule.read(dict(settings) | {"do_pad": False}, self.defaults)

    def videos(self, videos: Sequence[tuple[np.ndarray, float | None]]) -> Arrays:
        """Every frame that is given; as a list of [frames, 3, H, W] where the videos have different numbers."""
        made = [
            np.stack([self.video_rule(frame).transpose(2, 0, 1) for frame in frames]) for frames, _ in videos
        ]
        same = len({len(frames) for frames in made}) == 1
        return {"pixel_values_videos": np.stack(made) if same else made}

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        name = self.names[kind][0]
        if name not in arrays:
            raise UserError(f"there is no {name}")
        pixels, side = arrays[name], self.size
        for some in pixels:
            if some.ndim != 4 or some.shape[1:] != (3, side, side):
                what = "pictures, tiles" if kind == "image" else "videos, frames"
                raise UserError(
                    f"{name} has shape [{len(pixels)}, {', '.join(map(str, some.shape))}], [{what}, 3, {side}, {side}] "
                    "is needed"
                )
        views = [rearrange(some, "t c h w -> t h w c") for some in pixels]
        if kind == "video":
            return [self._video(frames) for frames in views]
        sizes = arrays.get("image_sizes")
        if sizes is None or sizes.shape != (len(pixels), 2):
            raise UserError(f"pixel_values needs image_sizes [{len(pixels)}, 2]")
        groups = arrays.get("batch_num_images", np.ones(len(pixels), int)).tolist()
        if sum(groups) != len(pixels):
            raise UserError(f"batch_num_images counts {sum(groups)} pictures, there are {len(pixels)}")
        return [
            self._item(view, tuple(size.tolist()) if cut else None)
            for view, size, cut in zip(views, sizes, _cut(groups), strict=True)
        ]

    def spans(self, longest: int) -> Iterable[int]:
        """Where features are scaled down, tokens are mixed of neighbouring tiles: of a row, or of all rows."""
        tiles = max(rows * columns // self.size**2 for rows, columns in self.sizes)
        return (1,) if self.most is None or tiles <= self.most else range(1, tiles + 1)

    def _item(self, views: np.ndarray, size: Size | None) -> Item:
        """A picture of (height, width) in tiles, or without one."""
        each = self.side**2
        index, taps = np.arange(each, dtype=np.int32), None
        if size is None:
            index, views = np.append(index, np.int32(NEWLINE)), views[:1]
        else:
            rows, columns = (length // self.size for length in best_size(size, self.sizes))
            count = 1 + rows * columns
            if len(views) < count:
                raise UserError(f"a picture of {size[0]} x {size[1]} has {count} tiles, not {len(views)}")
            views = views[:count]
            numbers = np.arange(each, count * each, dtype=np.int32)
            grid = rearrange(numbers, "(r c h w) -> (r h) (c w)", r=rows, c=columns, h=self.side)
            index, taps = self._lines(index, grid[unpadded(size, grid.shape)])
        return Item(index, len(views) * each, {"pixel_values": views}, taps=taps)

    def _lines(
        self, base: np.ndarray, grid: np.ndarray
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        """Index and taps of the whole's features and then those of the grid, each row with a newline."""
        rows, columns = grid.shape
        ratio = 0.0 if self.most is None else math.sqrt(rows * columns / (self.most * self.side**2))
        if ratio <= 1.1:
            lines = np.pad(grid, ((0, 0), (0, 1)), constant_values=NEWLINE)
            return np.concatenate([base, lines.ravel()]), None
        found, weights = stretch(grid, (int(rows // ratio), int(columns // ratio)))
        first = np.pad(found[..., 0], ((0, 0), (0, 1)), constant_values=NEWLINE).ravel()
        distances = np.pad(found - found[..., :1], ((0, 0), (0, 1), (0, 0)))
        weights = np.pad(weights, ((0, 0), (0, 1), (0, 0)))
        before = np.zeros((len(base), 4))
        distances = np.concatenate([before, distances.reshape(-1, 4)]).astype(np.int32)
        weights = np.concatenate([before, weights.reshape(-1, 4)]).astype(np.float32)
        weights[: len(base), 0] = 1
        return np.concatenate([base, first]), (distances, weights)

    def _video(self, frames: np.ndarray) -> Item:
        """Frames whose features are pooled to half the side, and one newline at the end."""
        half = -(-self.side // 2)
        grid = np.arange(self.side**2, dtype=np.int32).reshape(self.side, self.side)
        found, weights = (array.reshape(-1, 4) for array in stretch(grid, (half, half)))
        starts = np.arange(len(frames), dtype=np.int32)[:, None] * self.side**2
        index = np.append((found[:, 0] + starts).ravel(), np.int32(NEWLINE))
        distances = np.tile(found - found[:, :1], (len(frames), 1))
        weights = np.tile(weights, (len(frames), 1))
        taps = tuple(np.pad(array, ((0, 1), (0, 0))) for array in (distances, weights))
        return Item(index, len(frames) * self.side**2, {"pixel_values": frames}, taps=taps)


def _cut(groups: Sequence[int]) -> list[bool]:
    """Whether each picture is cut into tiles: those that are alone in their group."""
    return [count == 1 for count in groups for _ in range(count)]
