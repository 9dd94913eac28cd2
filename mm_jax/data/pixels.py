"""Pictures to pixel arrays with the numerics of transformers' processors on Pillow.

A picture is uint8 [H, W, 3] until it is normalised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from mm_jax.data.image import Transform
from mm_jax.errors import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
BILINEAR, BICUBIC = 2, 3  # as the settings' files number Pillow's filters


def resize(picture: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """To (height, width)."""
    image = PIL.Image.fromarray(picture).resize(size[::-1], PIL.Image.Resampling(resample))
    return np.asarray(image)


def center_crop(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle (height, width), with zeros around a picture that is smaller."""
    (height, width), (rows, columns) = picture.shape[:2], size
    top, left = (height - rows) // 2, (width - columns) // 2
    if top < 0 or left < 0:
        more = (max(rows, height), max(columns, width))
        before = tuple(-((old - new) // 2) for old, new in zip((height, width), more, strict=True))
        canvas = np.zeros((*more, 3), picture.dtype)
        canvas[before[0] : before[0] + height, before[1] : before[1] + width] = picture
        picture, top, left = canvas, top + before[0], left + before[1]
    return picture[max(top, 0) : top + rows, max(left, 0) : left + columns]


def pad_to_square(picture: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """Centred on a square of the long side (LLaVA-1.5)."""
    height, width = picture.shape[:2]
    side = max(height, width)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = np.asarray(colour, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = picture
    return canvas


def size_of(settings: Mapping[str, Any], height: int, width: int) -> tuple[int, int]:
    """(height, width) that a picture is resized to, from the "size" of the settings.

    Raises UserError for a size of another form.
    """
    size = settings
    if "shortest_edge" in size and size.get("longest_edge") is None:
        short, long = sorted((height, width))
        long = int(size["shortest_edge"] * long / short)
        return (long, size["shortest_edge"]) if width <= height else (size["shortest_edge"], long)
    if "height" in size and "width" in size:
        return size["height"], size["width"]
    if set(size) == {"longest_edge"}:  # of SAM's processor
        scale = size["longest_edge"] / max(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)
    raise UserError(
        f'the size {dict(size)} of the image processor is not supported; it needs "height" and "width"'
    )


@dataclass(frozen=True)
class PixelRule:
    """The steps of an image processor, in their order; a step that is None is not done.

    Attributes:
      pad_colour: pad to a square with it first.
      size: {"shortest_edge": n}, {"longest_edge": n} or {"height": h, "width": w}.
      resample: number of Pillow's filter.
      crop: (height, width) of the middle that is kept.
      rescale: factor.
      mean, std: per channel, after rescaling.
      fill: (height, width) that zeros on the right and below make up, last of all.
    """

    size: Mapping[str, int] | None
    resample: int = BICUBIC
    crop: tuple[int, int] | None = None
    pad_colour: tuple[int, ...] | None = None
    rescale: float | None = 1 / 255
    mean: tuple[float, ...] | None = HALF
    std: tuple[float, ...] | None = HALF
    fill: tuple[int, int] | None = None

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> float32 [h, w, 3]."""
        if self.pad_colour is not None:
            picture = pad_to_square(picture, self.pad_colour)
        if self.size is not None:
            picture = resize(picture, size_of(self.size, *picture.shape[:2]), self.resample)
        if self.crop is not None:
            picture = center_crop(picture, self.crop)
        values = self.normalise(picture)
        if self.fill is not None:
            more = [
                (0, max(whole - part, 0)) for whole, part in zip(self.fill, values.shape[:2], strict=True)
            ]
            values = np.pad(values, (*more, (0, 0)))
        return values

    def transform(self, size: tuple[int, int]) -> Transform:
        """Where the pixels of a picture of (width, height) land."""
        width, height = size
        x = y = 0.0
        if self.pad_colour is not None:
            side = max(size)
            x, y = (side - width) // 2, (side - height) // 2
            width = height = side
        across = down = 1.0
        if self.size is not None:
            rows, columns = size_of(self.size, height, width)
            across, down = columns / width, rows / height
            x, y, width, height = x * across, y * down, columns, rows
        if self.crop is not None:
            x, y = x - (width - self.crop[1]) // 2, y - (height - self.crop[0]) // 2
            height, width = self.crop
        if self.fill is not None:
            height, width = self.fill
        return Transform(size, (across, down), (x, y), (width, height))

    def normalise(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [..., 3] -> float32, rescaled in float64 and normalised in float32 as the reference does."""
        values = picture if self.rescale is None else (picture.astype(np.float64) * self.rescale)
        values = values.astype(np.float32)
        if self.mean is None:
            return values
        return (values - np.float32(self.mean)) / np.float32(self.std)

    @classmethod
    def read(cls, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> PixelRule:
        """From the fields of preprocessor_config.json.

        Args:
          defaults: of the reference's class, for fields that the file leaves out.

        Raises UserError for values that are not supported.
        """
        values = {**defaults, **{k: v for k, v in settings.items() if v is not None}}
        if lost := {"image_mean", "image_std", "size", "resample"} - set(values):
            raise UserError(f"preprocessor_config.json does not say {', '.join(sorted(lost))}")
        mean, std = (_three(values[name]) for name in ("image_mean", "image_std"))
        crop = _sides(values.get("crop_size")) if values.get("do_center_crop") else None
        fill = values.get("pad_size") if values.get("do_pad") else None
        size = values["size"]
        if not isinstance(size, Mapping):  # a number, in old files
            square = values.get("default_to_square", True)
            size = {"height": size, "width": size} if square else {"shortest_edge": size}
        if values.get("use_square_size") and "shortest_edge" in size:  # in files of Kosmos-2
            size = {"height": size["shortest_edge"], "width": size["shortest_edge"]}
        return cls(
            size=size if values.get("do_resize", True) else None,
            resample=int(values["resample"]),
            crop=crop,
            pad_colour=tuple(int(m * 255) for m in mean) if values.get("do_pad") and not fill else None,
            rescale=values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else None,
            mean=mean if values.get("do_normalize", True) else None,
            std=std if values.get("do_normalize", True) else None,
            fill=_sides(fill) if fill else None,
        )


def _three(value: float | Sequence[float]) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,) * 3


def _sides(value: int | Mapping[str, int]) -> tuple[int, int]:
    return (value["height"], value["width"]) if isinstance(value, Mapping) else (value, value)
