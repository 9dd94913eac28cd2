"""A picture and, where it is long, crops of it: pan and scan of Gemma 3 (reference: Gemma3ImageProcessor)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mm_jax.data.media_rule import MEDIA, Arrays, FixedImage, Item
from mm_jax.errors import UserError

START, END = "<start_of_image>", "<end_of_image>"
NEEDED = ("pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops", "pan_and_scan_min_ratio_to_activate")


def crops(size: tuple[int, int], least: int, most: int, ratio: float) -> list[tuple[slice, slice]]:
    """Rows and columns of the crops of a picture of (height, width), along its long side; none where it is not long
    enough.

    Args:
      least: pixels that a side of a crop must have.
      most: crops that there may be.
      ratio: of the sides from which there are crops.

    >>> crops((100, 250), 20, 4, 1.2)
    [(slice(0, 100, None), slice(0, 84, None)), (slice(0, 100, None), slice(84, 168, None)), (slice(0, 100, None), slice(168, 252, None))]
    """  # noqa: E501
    short, long = sorted(size)
    if long / short < ratio:
        return []
    count = min(long // least, math.floor(long / short + 0.5))
    count = min(max(count, 2), most)
    step = math.ceil(long / count)
    if min(step, short) < least:
        return []
    whole, parts = slice(0, short), [slice(k * step, (k + 1) * step) for k in range(count)]
    return [(whole, part) if size[1] >= size[0] else (part, whole) for part in parts]


class CropRule(FixedImage):
    """Pictures between two markers, with crops where the settings ask for them."""

    names = {"image": ("pixel_values", "num_crops")}
    placeholders = {"image": START}

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        found = [self._crops(image) for image in images]
        views = [view for image, some in zip(images, found, strict=True) for view in (image, *some)]
        return {**super().images(views), "num_crops": np.array([len(some) for some in found])}

    def _crops(self, picture: np.ndarray) -> list[np.ndarray]:
        settings = self.settings.need("image")
        if not settings.get("do_pan_and_scan"):
            return []
        if lost := [name for name in NEEDED if settings.get(name) is None]:
            raise UserError(
                f"preprocessor_config.json asks for do_pan_and_scan, but does not say {', '.join(lost)}"
            )
        parts = crops(picture.shape[:2], *(settings[name] for name in NEEDED))
        return [np.ascontiguousarray(picture[part]) for part in parts]

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        if "pixel_values" not in arrays:
            raise UserError("there are num_crops, but no pixel_values")
        views = super().items(kind, {"pixel_values": arrays["pixel_values"]}, counts)
        # the reference's processor leaves num_crops out: then each view is one item, whose text is there already
        numbers = arrays.get("num_crops", np.zeros(len(views), int))
        if sum(numbers) + len(numbers) != len(views):
            raise UserError(f"num_crops is {list(numbers)}, but there are {len(views)} pixel_values")
        found, at = [], 0
        for count in numbers:
            pixels = np.concatenate([view.arrays["pixel_values"] for view in views[at : at + 1 + count]])
            features = len(pixels) * self.num_tokens
            index = np.arange(features, dtype=np.int32)
            found.append(Item(index, features, {"pixel_values": pixels}, self._text(count)))
            at += 1 + count
        return found

    def _text(self, count: int) -> str:
        view = f"\n\n{START}{MEDIA * self.num_tokens}{END}\n\n"
        if not count:
            return view
        rest = " ".join([view] * count)
        return f"Here is the original image {view} and here are some crops to help you see better {rest}"
