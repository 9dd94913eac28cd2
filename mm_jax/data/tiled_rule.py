"""Pictures on canvases of tiles, which the decoder reads beside the text (Llama-3.2-Vision)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from einops import rearrange

from mm_jax.data.image import Transform
from mm_jax.data.media_rule import Arrays, Item, MediaRule, Settings
from mm_jax.data.pixels import BILINEAR, HALF, PixelRule, resize
from mm_jax.errors import UserError

SEES, ATTENDS = 1, 2  # values of `seen`

# of the reference's MllamaImageProcessor
DEFAULTS = {
    "size": {"height": 224, "width": 224},
    "resample": BILINEAR,
    "image_mean": HALF,
    "image_std": HALF,
    "max_image_tiles": 4,
}


def shapes(tiles: int) -> list[tuple[int, int]]:
    """The grids (rows, columns) of at most so many tiles, in the order of their numbers from 1 on."""
    sides = range(1, tiles + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= tiles]


def canvas(size: tuple[int, int], tiles: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The grid of tiles for a picture of (height, width), and the (height, width) that it then gets.

    The grid that enlarges the picture least or, where none is large enough, shrinks it least; of several the smallest.
    """
    height, width = size
    grids = shapes(tiles)
    scales = [min(rows * side / height, columns * side / width) for rows, columns in grids]
    larger = [scale for scale in scales if scale >= 1]
    best = min(larger) if larger else max(scales)
    fitting = [grid for grid, scale in zip(grids, scales, strict=True) if scale == best]
    rows, columns = min(fitting, key=math.prod)
    most_high, most_wide = rows * side, columns * side
    high, wide = min(max(height, side), most_high), min(max(width, side), most_wide)
    if wide / width < high / height:
        return (rows, columns), (min(math.floor(height * (wide / width)) or 1, high), wide)
    return (rows, columns), (high, min(math.floor(width * (high / height)) or 1, wide))


def visible(places: Sequence[int], length: int) -> list[int]:
    """Up to which token each picture is seen, from its own place on: up to the next picture, of pictures that follow
    each other at once all up to the same.

    >>> visible([1, 4, 5], 8)
    [4, 8, 8]
    """
    ends = [*places[1:], length][: len(places)]
    for k in reversed(range(len(places) - 1)):
        if places[k] == ends[k] - 1:
            ends[k] = ends[k + 1]
    return ends


class TiledRule(MediaRule):
    """A picture is one token of text. Its features are read by that token and those behind it, up to the next picture.

    Args:
      token_id: of a picture.
      tiles: that the tower takes.
      size: (height, width) of a tile.
      features: of a picture.
    """

    names = {"image": ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")}
    ignored = (*MediaRule.ignored, "num_tiles")

    def __init__(
        self, settings: Settings, *, token_id: int, tiles: int, size: tuple[int, int], features: int
    ):
        super().__init__(settings)
        self.tokens = {"image": token_id}
        self.tiles, self.size, self.features = tiles, size, features

    @cached_property
    def rule(self) -> PixelRule:
        """Raises UserError for other tiles than the tower's."""
        settings = self.settings.need("image")
        rule = PixelRule.read({k: v for k, v in settings.items() if k != "do_pad"}, DEFAULTS)
        tiles = settings.get("max_image_tiles", DEFAULTS["max_image_tiles"])
        size = (rule.size or {}).get("height"), (rule.size or {}).get("width")
        if tiles != self.tiles or size != self.size:
            raise UserError(
                f"preprocessor_config.json is for {tiles} tiles of {size[0]} x {size[1]}, the tower takes "
                f"{self.tiles} of {self.size[0]} x {self.size[1]}"
            )
        return rule

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        """Pictures of one conversation.

        Returns:
          pixel_values [1, pictures, tiles, 3, H, W], aspect_ratio_ids [1, pictures] and aspect_ratio_mask
          [1, pictures, tiles], 1 for tiles that there are.
        """
        side = self.size[0]
        pixels = np.zeros((len(images), self.tiles, 3, *self.size), np.float32)
        numbers, mask = [], np.zeros((len(images), self.tiles), np.int64)
        for k, picture in enumerate(images):
            grid, size = canvas(picture.shape[:2], self.tiles, side)
            drawn = np.zeros((grid[0] * side, grid[1] * side, 3), np.uint8)
            drawn[: size[0], : size[1]] = resize(picture, size, self.rule.resample)
            cut = rearrange(self.rule.normalise(drawn), "(r h) (c w) d -> (r c) d h w", r=grid[0], c=grid[1])
            pixels[k, : len(cut)], mask[k, : len(cut)] = cut, 1
            numbers.append(shapes(self.tiles).index(grid) + 1)
        return {
            "pixel_values": pixels[None],
            "aspect_ratio_ids": np.array(numbers, np.int64)[None],
            "aspect_ratio_mask": mask[None],
        }

    def transform(self, size: tuple[int, int]) -> Transform:
        (rows, columns), (height, width) = canvas(size[::-1], self.tiles, self.size[0])
        whole = (columns * self.size[1], rows * self.size[0])
        return Transform(size, (width / size[0], height / size[1]), (0, 0), whole)

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        return [item for row in self._rows(arrays, [None]) for item in row]

    def by_row(self, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[list[Item]]:
        return self._rows(arrays, counts)

    def _rows(self, arrays: Mapping[str, np.ndarray], counts: Sequence[int | None]) -> list[list[Item]]:
        """Every picture of each row, those behind the `counts` that its text has included: the reference's decoder
        attends to them."""
        lost = [name for name in self.names["image"][:3] if name not in arrays]
        if lost:
            raise UserError(f"pixel_values need {' and '.join(lost)} beside them")
        pixels, numbers, mask = (arrays[name] for name in self.names["image"][:3])
        rows, slots = (len(counts), pixels.shape[1] if pixels.ndim == 6 else 0)
        shape = (rows, slots, self.tiles, 3, *self.size)
        if pixels.shape != shape:
            raise UserError(f"pixel_values has shape {list(pixels.shape)}, {list(shape)} is needed")
        for name, array, needed in (
            ("aspect_ratio_ids", numbers, shape[:2]),
            ("aspect_ratio_mask", mask, shape[:3]),
        ):
            if array.shape != needed:
                raise UserError(f"{name} has shape {list(array.shape)}, {list(needed)} is needed")
        real = mask.sum(axis=-1)
        if not np.array_equal(mask > 0, np.arange(self.tiles) < real[..., None]):
            raise UserError("aspect_ratio_mask has a tile behind one that is not there")
        if not 0 <= numbers.min(initial=0) <= numbers.max(initial=0) <= len(shapes(self.tiles)):
            raise UserError(f"aspect_ratio_ids are 0 to {len(shapes(self.tiles))}")
        found = []
        for row, count in enumerate(counts):
            count = slots if count is None else count
            if count > slots:
                raise UserError(f"row {row} has {count} image tokens, but there are {slots} pictures")
            found.append(
                [
                    Item(
                        np.full(int(k < count), -1, np.int32),  # a picture's token stays a token
                        self.features,
                        {
                            "pixel_values": np.moveaxis(pixels[row, k], 1, -1)[None],
                            "tile_shapes": np.array([numbers[row, k]], np.int32),
                            "tile_counts": np.array([real[row, k]], np.int32),
                        },
                    )
                    for k in range(slots)
                ]
            )
        return found

    def seen(self, tokens: np.ndarray, items: Mapping[str, Sequence[Item]]) -> np.ndarray | None:
        media = items.get("image", ())
        places = np.flatnonzero(tokens == self.tokens["image"]).tolist()
        found = np.zeros((len(tokens), len(media), self.tiles), np.int8)
        for k, (start, end) in enumerate(zip(places, visible(places, len(tokens)), strict=True)):
            found[start:end, k, : int(media[k].arrays["tile_counts"][0])] = SEES
        return _attending(rearrange(found, "t n c -> t (n c)"))

    def given_seen(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray | None:
        mask = arrays.get("cross_attention_mask")
        if mask is None or arrays.get("pixel_values") is None:
            return None
        mask, slots = np.asarray(mask), np.shape(arrays["pixel_values"])[1]
        if mask.shape != (*shape, slots, self.tiles):
            raise UserError(
                f"cross_attention_mask has shape {list(mask.shape)}, {[*shape, slots, self.tiles]} is needed"
            )
        return _attending(rearrange(mask > 0, "b t n c -> b t (n c)").astype(np.int8) * np.int8(SEES))


def _attending(seen: np.ndarray) -> np.ndarray:
    """Tokens that see nothing attend to everything, as in the reference."""
    return np.where(seen.any(axis=-1, keepdims=True), seen, np.int8(ATTENDS))
