"""Pictures in patches whose number has a limit, each picture in its own shape: NaFlex of SigLIP2 (reference:
Siglip2ImageProcessor)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.data.image import Transform
from mm_jax.data.media_rule import Arrays, Item
from mm_jax.data.native_rule import NativeItem, NativeRule
from mm_jax.data.patches import Medium, PatchLayout, slots
from mm_jax.data.pixels import BILINEAR, HALF, PixelRule, resize
from mm_jax.errors import UserError

DEFAULTS = {"size": {}, "resample": BILINEAR, "image_mean": HALF, "image_std": HALF}
MOST_PATCHES = 256
NARROW, LARGEST = 1e-5, 100.0  # of the search for a scale


def naflex_size(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """(height, width) in whole squares of `side` pixels, at most `most` of them, nearly in the picture's own shape.

    >>> naflex_size(30, 60, 16, 18)
    (48, 96)
    """

    def sides(scale: float) -> tuple[int, int]:
        return tuple(max(side, math.ceil(n * scale / side) * side) for n in (height, width))

    low, high = NARROW / 10, LARGEST
    while high - low >= NARROW:
        middle = (low + high) / 2
        rows, columns = sides(middle)
        low, high = (middle, high) if (rows // side) * (columns // side) <= most else (low, middle)
    return sides(low)


def patches_of(
    pixel_values: np.ndarray, mask: np.ndarray | None, shapes: np.ndarray, dim: int
) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """Of the reference's arrays the patches [rows * columns, dim] of each picture, row by row, and (rows, columns).

    Raises UserError for arrays that do not fit each other.
    """
    if pixel_values.ndim != 3 or pixel_values.shape[2] != dim or shapes.shape != (len(pixel_values), 2):
        raise UserError(
            f"pixel_values has shape {list(pixel_values.shape)} and spatial_shapes {list(shapes.shape)}; [pictures, "
            f"patches, {dim}] and [pictures, 2] are needed"
        )
    counts = shapes.prod(axis=1)
    if shapes.min(initial=1) < 1 or counts.max(initial=0) > pixel_values.shape[1]:
        raise UserError(
            f"spatial_shapes has more patches than the {pixel_values.shape[1]} of pixel_values, or none"
        )
    real = np.arange(pixel_values.shape[1]) < counts[:, None]
    if mask is not None and not np.array_equal(np.asarray(mask) > 0, real):
        raise UserError("pixel_attention_mask is not that of spatial_shapes")
    return [
        (values[:count], (int(rows), int(columns)))
        for values, count, (rows, columns) in zip(pixel_values, counts, shapes, strict=True)
    ]


class NaflexRule(NativeRule):
    """`NativeRule` for pictures that all have room for as many patches, of which small ones leave some empty.

    Several neighbouring patches may make one token, as the layout says: pictures then have sides of whole squares.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.names = {"image": ("pixel_values", "pixel_attention_mask", "spatial_shapes")}

    @cached_property
    def rule(self) -> PixelRule:
        return PixelRule.read(self.settings.need("image"), DEFAULTS)

    @cached_property
    def most(self) -> int:
        """Patches that a picture has room for."""
        return self.settings.need("image").get("max_num_patches") or MOST_PATCHES

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture is resized to. Raises UserError for other patches than the tower's."""
        given = self.settings.need("image").get("patch_size", self.patch)
        if given != self.patch:
            raise UserError(
                f"preprocessor_config.json is for patches of {given} pixels, the tower has {self.patch}"
            )
        if self.rule.size is None:
            return height, width
        merge = self.layout.merge
        return naflex_size(height, width, self.patch * merge, self.most // merge**2)

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        values, shapes = [], []
        for picture in images:
            resized = resize(picture, self.size(*picture.shape[:2]), self.rule.resample)
            pixels = self.rule.normalise(resized)
            rows, columns = (n // self.patch for n in pixels.shape[:2])
            pixels = pixels[: rows * self.patch, : columns * self.patch]
            values.append(rearrange(pixels, "(h p) (w q) c -> (h w) (p q c)", h=rows, w=columns))
            shapes.append((rows, columns))
        longest = max(self.most, *map(len, values))
        room = np.arange(longest) < np.prod(shapes, axis=1)[:, None]
        return {
            "pixel_values": np.stack([np.pad(x, ((0, longest - len(x)), (0, 0))) for x in values]),
            "pixel_attention_mask": room.astype(np.int32),
            "spatial_shapes": np.array(shapes, np.int64),
        }

    def transform(self, size: tuple[int, int]) -> Transform:
        rows, columns = self.size(size[1], size[0])
        return Transform(size, (columns / size[0], rows / size[1]), (0, 0), (columns, rows))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = self.size(size[1], size[0])
        side = self.patch * self.layout.merge
        return height // side, width // side

    def spans(self, longest: int) -> Iterable[int]:
        if self.settings.image is None:
            return ()
        room = longest * self.layout.merge**2
        most = room if self.rule.size is None else min(self.most, room)
        return range(self.layout.block, self.layout.most_slots(most) + 1, self.layout.block)

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        if lost := [name for name in ("pixel_values", "spatial_shapes") if name not in arrays]:
            raise UserError(f"there is no {' and no '.join(lost)}")
        dim = 3 * self.patch**2
        found = patches_of(
            arrays["pixel_values"], arrays.get("pixel_attention_mask"), arrays["spatial_shapes"], dim
        )
        return [naflex_item(values, grid, self.layout) for values, grid in found]


def naflex_item(values: np.ndarray, grid: tuple[int, int], layout: PatchLayout) -> NativeItem:
    """A picture of patches [rows * columns, dim], row by row. Raises UserError for a grid that cannot be merged."""
    merge = layout.merge
    if grid[0] % merge or grid[1] % merge:
        raise UserError(f"a grid of {grid[0]} x {grid[1]} patches cannot be merged {merge} x {merge}")
    squares = rearrange(values, "(h a w b) d -> (h w a b) d", h=grid[0] // merge, a=merge, b=merge)
    medium = Medium(squares, (1, *grid))
    placed, index = slots(medium, layout)
    return NativeItem(index, len(placed["patches"]) // merge**2, placed, medium=medium)
