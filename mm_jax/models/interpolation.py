"""Learned position tables of one grid on pictures of another."""

import jax
import jax.numpy as jnp
import numpy as np


def cubic_weights(new: int, old: int, smooth: bool = False) -> np.ndarray:
    """Bicubic interpolation along one axis as a matrix: float32 [new, old].

    Keys' kernel, pixel centres at halves, as torch.nn.functional.interpolate has it in its mode "bicubic": with
    a = -0.75 and edges repeated, or smooth (its antialias): with a = -0.5, a kernel that widens when the size shrinks,
    and the weights of what lies outside given to what lies inside.
    """
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    if smooth:
        weights = _cubic((np.arange(old) - centres[:, None]) / max(old / new, 1.0), -0.5)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    first = np.floor(centres).astype(int) - 1
    weights = np.zeros((new, old))
    for k in range(4):
        part = _cubic(centres - (first + k), -0.75)
        np.add.at(weights, (np.arange(new), np.clip(first + k, 0, old - 1)), part)
    return weights.astype(np.float32)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys 1981, with its parameter a."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = (((d - 5) * d + 8) * d - 4) * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def resize_table(
    table: jax.Array, old: tuple[int, int], new: tuple[int, int], smooth: bool = False
) -> jax.Array:
    """[rows * columns, D] of the grid `old` -> [rows * columns, D] of the grid `new`, in float32."""
    if old == new:
        return table
    rows, columns = (jnp.asarray(cubic_weights(n, o, smooth)) for n, o in zip(new, old, strict=True))
    square = table.astype(jnp.float32).reshape(*old, -1)
    return jnp.einsum("ro,cp,opd->rcd", rows, columns, square).reshape(new[0] * new[1], -1)
