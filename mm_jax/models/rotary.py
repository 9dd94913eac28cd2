"""Rotary position embeddings and the ways to stretch them beyond the trained length."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Rotation = tuple[jax.Array, jax.Array]  # sines and cosines, float32 [B, T, 1, H / 2]


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of a rotary embedding are changed for longer texts.

    Attributes:
      kind: "linear" divides every frequency by `factor` (Chen et al. 2023). "dynamic" raises the base once a text is
        longer than `original_length` (NTK-aware scaling); "doubling" does so in steps, one for every doubling of the
        length (Qwen-7B). "llama3" divides the slow frequencies, keeps the fast ones
        and blends between (Llama 3.1). "yarn" does so by the number of turns within `original_length`
        (Peng et al. 2023).
      factor: how many times longer texts may be; unused by "doubling".
      original_length: tokens of the texts that the model was first trained on; unused by "linear".
      low_factor, high_factor: of "llama3": wavelengths over original_length / low_factor are divided, those under
        original_length / high_factor kept.
      fast_turns, slow_turns: of "yarn": frequencies that turn more often than the first are kept, less often than the
        second divided.
      whole_channels: of "yarn": round the ends of the blend outwards to whole channels.
      magnitude: of "yarn": factor on queries and keys.
    """

    kind: Literal["linear", "dynamic", "doubling", "llama3", "yarn"]
    factor: float
    original_length: int = 0
    low_factor: float = 1.0
    high_factor: float = 4.0
    fast_turns: float = 32.0
    slow_turns: float = 1.0
    whole_channels: bool = True
    magnitude: float = 1.0


def rotation(
    positions: jax.Array,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    axes: np.ndarray | None = None,
    lengths: jax.Array | None = None,
) -> Rotation:
    """Sines and cosines of the angles position * frequency, with frequencies theta ** (-2 i / head_dim).

    Args:
      positions: int32 [B, T], or [B, T, 3] along several axes (M-RoPE).
      axes: int [H / 2], the axis whose position turns each frequency, see `channel_axes`; needed for several.
      scaling: with kind "dynamic" the largest position of the whole batch decides, as in the reference.
      lengths: int32 [B, T], of the text that each position is in, see `text_lengths`; of kind "doubling" alone, which
        needs them.
    """
    frequencies = _frequencies(head_dim, theta)
    magnitude = 1.0
    if scaling is not None:
        known = lengths if scaling.kind == "doubling" else positions
        frequencies = _SCALED[scaling.kind](frequencies, head_dim, theta, scaling, known)
        magnitude = scaling.magnitude
    turning = positions[..., None] if positions.ndim == 2 else positions[..., axes]
    angles = turning[..., None, :].astype(jnp.float32) * frequencies
    return jnp.sin(angles) * magnitude, jnp.cos(angles) * magnitude


def text_lengths(positions: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Tokens of the text that each position int32 [B, T] is in, int32 [B, T]: one more than its largest position. Texts
    are the segments int32 [B, T]; None: a row is one."""
    if segment_ids is None:
        return jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)

    def row(positions: jax.Array, segments: jax.Array) -> jax.Array:
        return jax.ops.segment_max(positions, segments, num_segments=len(segments) + 1)[segments] + 1

    return jax.vmap(row)(positions, segment_ids)


def log_growth(positions: jax.Array, length: int) -> jax.Array:
    """Factors float32 [B, T] on queries at positions int32 [B, T]: 1 up to the trained length, then
    log(position + 1) / log(length), so that attention over more tokens stays as sharp (Su 2021, "logn")."""
    return jnp.maximum(jnp.log(jnp.maximum(positions + 1, 1).astype(jnp.float32)) / math.log(length), 1.0)


def channel_axes(sections: tuple[int, ...], interleaved: bool) -> np.ndarray:
    """Which axis of [time, row, column] turns each frequency: int [sum(sections)].

    In blocks (Qwen2-VL section 2.1), or in turns, time taking the rest where the others have run out (Qwen3-VL).

    >>> channel_axes((2, 3, 3), False)
    array([0, 0, 1, 1, 1, 2, 2, 2])
    >>> channel_axes((4, 2, 2), True)
    array([0, 1, 2, 0, 1, 2, 0, 0])
    """
    axes = np.repeat(np.arange(len(sections)), sections)
    if interleaved:
        axes[:] = 0
        for axis in (1, 2):
            axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def axial_rotation(positions: jax.Array, head_dim: int, theta: float) -> Rotation:
    """Each axis of positions int32 [B, T, A] turns its own head_dim / A channels (2-D rotary of Qwen2-VL's tower)."""
    axes = positions.shape[-1]
    turned = [rotation(positions[..., axis], head_dim // axes, theta) for axis in range(axes)]
    sines, cosines = zip(*turned, strict=True)
    return jnp.concatenate(sines, axis=-1), jnp.concatenate(cosines, axis=-1)


def rotate(x: jax.Array, turned: Rotation) -> jax.Array:
    """Rotate heads in half-split form (Su et al. 2021; the layout of the Llama reference).

    Args:
      x: [B, T, N, H]; channel i of the first half of a head pairs with channel i of the second half.
      turned: from `rotation`; of fewer channels, the first ones are turned.
    """
    sin, cos = turned
    channels = 2 * sin.shape[-1]
    if channels < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :channels], turned), x[..., channels:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _frequencies(head_dim: int, theta: float) -> np.ndarray:
    return (theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


def _linear(frequencies, head_dim, theta, scaling, positions):
    return frequencies / np.float32(scaling.factor)


def _dynamic(frequencies, head_dim, theta, scaling, positions):
    length = jnp.maximum(jnp.max(positions) + 1, scaling.original_length).astype(jnp.float32)
    stretch = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
    # theta * stretch ** (d / (d - 2)) to the power of -2 i / d
    return frequencies * stretch ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / (head_dim - 2))


def _doubling(frequencies, head_dim, theta, scaling, lengths):
    bounds = scaling.original_length * 2 ** np.arange(31 - scaling.original_length.bit_length())
    doublings = jnp.sum(lengths[..., None] > jnp.asarray(bounds, jnp.int32), axis=-1)
    stretch = (2.0 ** (doublings + 1) - 1)[..., None, None]
    return frequencies * stretch ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / (head_dim - 2))


def _llama3(frequencies, head_dim, theta, scaling, positions):
    turns = scaling.original_length * frequencies / (2 * np.pi)
    keep = (turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    return _blend(frequencies, np.clip(keep, 0, 1), scaling.factor)


def _yarn(frequencies, head_dim, theta, scaling, positions):
    def channel(turns: float) -> float:
        """The (fractional) channel that turns this often within the original length."""
        return head_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel(scaling.fast_turns), channel(scaling.slow_turns)
    if scaling.whole_channels:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (np.arange(head_dim // 2) - first) / max(last - first, 1e-3)
    return _blend(frequencies, 1 - np.clip(ramp, 0, 1), scaling.factor)


def _blend(frequencies: np.ndarray, keep: np.ndarray, factor: float) -> np.ndarray:
    return (frequencies * keep + frequencies / factor * (1 - keep)).astype(np.float32)


_SCALED = {"linear": _linear, "dynamic": _dynamic, "doubling": _doubling, "llama3": _llama3, "yarn": _yarn}
