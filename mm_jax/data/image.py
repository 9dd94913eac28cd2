"""A picture of any size to the fixed picture that the encoder sees, and how boxes move with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import PIL.Image

from mm_jax.errors import UserError, nearest

_MODES = ("pad", "stretch", "crop")
_RESAMPLE = {
    "nearest": PIL.Image.Resampling.NEAREST,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Transform:
    """The affine map from original pixels to pixels of the model's picture: x * scale + offset.

    original: (width, height) of the picture as decoded; size: (width, height) of the model's picture.

    >>> wide = Transform(original=(200, 100), scale=(0.32, 0.32), offset=(0, 16), size=(64, 64))
    >>> wide.forward((50, 25, 100, 50))
    (0.25, 0.375, 0.5, 0.5)
    >>> wide.inverse((0.25, 0.375, 0.5, 0.5))
    (50.0, 25.0, 100.0, 50.0)
    """

    original: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]
    size: tuple[int, int]

    def forward(self, box: tuple[float, ...]) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in original pixels to 0..1 of the model's picture, clipped to it."""
        (sx, sy), (dx, dy), (width, height) = self.scale, self.offset, self.size
        x0, y0, x1, y1 = box
        return (
            _clip((x0 * sx + dx) / width, 1.0),
            _clip((y0 * sy + dy) / height, 1.0),
            _clip((x1 * sx + dx) / width, 1.0),
            _clip((y1 * sy + dy) / height, 1.0),
        )

    def inverse(self, box: tuple[float, ...]) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in 0..1 of the model's picture to original pixels, clipped to the original."""
        (sx, sy), (dx, dy), (width, height) = self.scale, self.offset, self.size
        x0, y0, x1, y1 = box
        return (
            _clip((x0 * width - dx) / sx, float(self.original[0])),
            _clip((y0 * height - dy) / sy, float(self.original[1])),
            _clip((x1 * width - dx) / sx, float(self.original[0])),
            _clip((y1 * height - dy) / sy, float(self.original[1])),
        )


def _clip(value: float, high: float) -> float:
    return min(max(value, 0.0), high)


@dataclass(frozen=True)
class ImageRule:
    """How a picture becomes `pixel_values` [height, width, 3] float32, (rgb / 255 - mean) / std.

    mode: "pad" fits the whole picture and centres it on pad_colour; "stretch" ignores the aspect ratio;
    "crop" scales the short side and cuts the centre. pad_colour: "mean" or (r, g, b) in 0..255.
    num_tokens: pseudo-tokens that a picture takes in the text (what the projector makes of it).
    """

    height: int = 64
    width: int = 64
    mode: str = "pad"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pad_colour: str | tuple[int, int, int] = "mean"
    resample: str = "bicubic"
    num_tokens: int = 16

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise UserError(f'image mode "{self.mode}" is unknown{nearest(self.mode, _MODES)}')
        if self.resample not in _RESAMPLE:
            raise UserError(f'image resample "{self.resample}" is unknown{nearest(self.resample, _RESAMPLE)}')
        if isinstance(self.pad_colour, str) and self.pad_colour != "mean":
            raise UserError(f'image pad_colour is "mean" or (r, g, b), not "{self.pad_colour}"')
        if min(self.height, self.width, self.num_tokens) < 1:
            raise UserError("image height, width and num_tokens must be at least 1")

    def transform(self, size: tuple[int, int]) -> Transform:
        """Where a picture of (width, height) lands, without looking at its pixels."""
        width, height = size
        target = (self.width, self.height)
        if self.mode == "stretch":
            return Transform(size, (self.width / width, self.height / height), (0, 0), target)
        choose = min if self.mode == "pad" else max
        scale = choose(self.width / width, self.height / height)
        new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
        # the scale of the resized grid, not the wished one, so that boxes fit to the pixel
        return Transform(
            size,
            (new_width / width, new_height / height),
            ((self.width - new_width) // 2, (self.height - new_height) // 2),
            target,
        )

    def __call__(self, image: PIL.Image.Image) -> tuple[np.ndarray, Transform]:
        """An RGB picture to (pixel_values [height, width, 3] float32, its Transform)."""
        transform = self.transform(image.size)
        resample = _RESAMPLE[self.resample]
        target = (self.width, self.height)
        if self.mode == "crop":
            # resizing only the kept part: a very long picture must not be scaled up as a whole
            (sx, sy), (dx, dy) = transform.scale, transform.offset
            kept = (-dx / sx, -dy / sy, (self.width - dx) / sx, (self.height - dy) / sy)
            kept = tuple(min(max(v, 0), image.size[k % 2]) for k, v in enumerate(kept))
            image = image.resize(target, resample, box=kept)
        elif self.mode == "stretch":
            image = image.resize(target, resample)
        else:
            new = (round(transform.scale[0] * image.width), round(transform.scale[1] * image.height))
            if new != image.size:
                image = image.resize(new, resample)
            if new != target:
                canvas = PIL.Image.new("RGB", target, self.fill)
                canvas.paste(image, transform.offset)
                image = canvas
        gain, bias = _affine(self.mean, self.std)
        return np.asarray(image, np.float32) * gain + bias, transform

    @property
    def fill(self) -> tuple[int, int, int]:
        """The 8-bit colour of the padding."""
        if self.pad_colour == "mean":
            return tuple(round(m * 255) for m in self.mean)
        return tuple(self.pad_colour)


@lru_cache(maxsize=32)
def _affine(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """x * gain + bias == (x / 255 - mean) / std."""
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
