"""The bicubic interpolation of torch, which is not that of picture libraries."""

from __future__ import annotations

import numpy as np

SHARPNESS = -0.75  # Pillow's is -0.5


def _matrix(old: int, new: int) -> np.ndarray:
    """[new, old], a row of weights for each new place: half-pixel centres, edges repeated, no antialiasing."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int) - 1
    matrix = np.zeros((new, old))
    for k in range(4):
        distance = np.abs(place - (first + k))
        near = ((SHARPNESS + 2) * distance - (SHARPNESS + 3)) * distance**2 + 1
        far = SHARPNESS * (((distance - 5) * distance + 8) * distance - 4)
        np.add.at(
            matrix,
            (np.arange(new), np.clip(first + k, 0, old - 1)),
            np.where(distance <= 1, near, far),
        )
    return matrix


def bicubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, C] resized to (height, width), as `torch.nn.functional.interpolate(mode="bicubic")` does."""
    rows, columns = _matrix(image.shape[0], size[0]), _matrix(image.shape[1], size[1])
    wide = np.tensordot(rows, image.astype(float), (1, 0))  # [h, W, C]
    return np.moveaxis(np.tensordot(columns, wide, (1, 1)), 0, 1).astype(image.dtype)
