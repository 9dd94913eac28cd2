"""The Conformer: attention and convolution side by side, over log-mel frames or the waveform itself."""

import math
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mm_jax.models.attention import attention, attention_mask
from mm_jax.models.execution import Execution
from mm_jax.models.layers import ACTIVATIONS, CLOSED, MLP, Activation, layer_norm, stack
from mm_jax.models.rotary import Rotation, rotate, rotation

NORM_EPS = 1e-5  # of the norms inside


@dataclass(frozen=True)
class MelSubsampling:
    """Strided 2-D convolutions over frames and mel bands (Rekesh et al. 2023, Fast Conformer).

    Attributes:
      factor: by which frames and bands get fewer; a power of two.
      channels: of every convolution.
      kernel_size: odd.
    """

    factor: int = 4
    channels: int = 64
    kernel_size: int = 3

    @property
    def num_layers(self) -> int:
        return int(math.log2(self.factor))

    def length(self, frames):
        """Positions of so many frames, int or array."""
        for _ in range(self.num_layers):
            frames = (frames + 1) // 2
        return frames


@dataclass(frozen=True)
class WaveformConvolutions:
    """Unpadded convolutions over samples (Baevski et al. 2020, wav2vec 2.0).

    Attributes:
      channels, kernels, strides: of each convolution; the waveform has one channel.
      norm: after the first convolution over time, each channel by itself ("first"), or after every one over channels.
    """

    channels: tuple[int, ...] = (512,) * 7
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    norm: Literal["first", "every"] = "first"
    activation: Activation = "gelu"
    use_bias: bool = False

    def length(self, frames):
        """Positions of so many samples, int or array."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            frames = (frames - kernel) // stride + 1
        return frames


@dataclass(frozen=True)
class ConformerConfig:
    """Sizes and options of a Conformer.

    Attributes:
      num_mels: channels of the input: mel bands, or 1 for a waveform.
      max_frames: log-mel frames of a window, or samples of a waveform.
      front: what makes encoder positions of frames.
      kernel_size: positions that the convolution of a block sees; odd.
      positions: sines and cosines of distances (Dai et al. 2019, Transformer-XL), rotation of the input of query and
        key, or none.
      use_bias: biases of attention and MLPs; conv_bias: of the convolutions in the blocks.
      conv_norm: of what the convolution of a block gives: over channels, or with the batch statistics of a trained
        checkpoint, which are constants.
      scale_input: positions are multiplied by sqrt(embed_dim) in front of the blocks.
      input_norm: layer norm in front of the map to embed_dim; final_norm: after the last block. Their eps is norm_eps.
    """

    num_mels: int = 80
    max_frames: int = 160
    front: MelSubsampling | WaveformConvolutions = MelSubsampling()
    embed_dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_dim: int = 512
    kernel_size: int = 9
    activation: Activation = "silu"
    positions: Literal["relative", "rotary", "none"] = "relative"
    rope_theta: float = 10_000.0
    use_bias: bool = True
    conv_bias: bool = True
    conv_norm: Literal["layer", "batch"] = "layer"
    scale_input: bool = False
    input_norm: bool = False
    final_norm: bool = False
    norm_eps: float = 1e-5

    @property
    def num_positions(self) -> int:
        """Encoder positions of a full window."""
        return self.positions_of(self.max_frames)

    @property
    def feature_dim(self) -> int:
        """Channels of a position."""
        return self.embed_dim

    def positions_of(self, frames):
        """Encoder positions of so many frames, int or array."""
        return self.front.length(frames)


def distances(length: int, channels: int) -> np.ndarray:
    """float32 [2 * length - 1, channels], of the distances length - 1 .. 1 - length: sines and cosines in turn."""
    frequencies = np.exp(-np.log(10_000.0) / channels * np.arange(0, channels, 2))
    angles = np.arange(length - 1, -length, -1)[:, None] * frequencies
    return (
        np.stack([np.sin(angles), np.cos(angles)], axis=-1)
        .reshape(2 * length - 1, channels)
        .astype(np.float32)
    )


def _reaches(lengths: jax.Array, size: int) -> jax.Array:
    """bool [N, size]"""
    return jnp.arange(size) < lengths[:, None]


class MelFront(nn.Module):
    """See `MelSubsampling`: one full convolution, then pairs of depthwise and pointwise ones, each with ReLU."""

    config: MelSubsampling
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, frames: jax.Array) -> jax.Array:
        """[N, frames, mels] -> [N, positions, channels * fewer mels]."""
        c = self.config

        def convolve(x: jax.Array, name: str, kernel: int, stride: int, groups: int = 1) -> jax.Array:
            pad = ((kernel - 1) // 2,) * 2
            sizes = {"kernel_size": (kernel, kernel), "strides": (stride, stride), "padding": (pad, pad)}
            conv = nn.Conv(c.channels, **sizes, feature_group_count=groups, dtype=self.dtype, name=name)
            # biases must not reach the next convolution from past the end
            return jnp.where(_reaches(frames, -(-x.shape[1] // stride))[..., None, None], conv(x), 0)

        x = jnp.where(_reaches(frames, x.shape[1])[..., None], x, 0)[..., None]
        for k in range(c.num_layers):
            frames = (frames + 1) // 2
            if k == 0:
                x = convolve(x, "conv", c.kernel_size, 2)
            else:
                x = convolve(x, f"depthwise{k}", c.kernel_size, 2, c.channels)
                x = convolve(x, f"pointwise{k}", 1, 1)
            x = nn.relu(x)
        return rearrange(x, "n t m c -> n t (c m)")


class WaveformFront(nn.Module):
    """See `WaveformConvolutions`."""

    config: WaveformConvolutions
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, frames: jax.Array) -> jax.Array:
        """[N, samples, 1] -> [N, positions, channels]."""
        c = self.config
        for k, (channels, kernel, stride) in enumerate(zip(c.channels, c.kernels, c.strides, strict=True)):
            conv = nn.Conv(
                channels,
                (kernel,),
                (stride,),
                "VALID",
                use_bias=c.use_bias,
                dtype=self.dtype,
                name=f"conv{k}",
            )
            x = conv(x)
            frames = (frames - kernel) // stride + 1
            if c.norm == "every":
                x = layer_norm(NORM_EPS, self.dtype, f"norm{k}")(x)
            elif k == 0:
                x = _TimeNorm(self.dtype, name="norm0")(x, _reaches(frames, x.shape[1]))
            x = ACTIVATIONS[c.activation](x)
        return x


class _TimeNorm(nn.Module):
    """Each channel by its mean and variance over the real positions of a clip (a group norm of one channel a group)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """[N, T, C], bool [N, T] -> [N, T, C]."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        x, where = x.astype(jnp.float32), real[..., None]
        count = jnp.maximum(where.sum(1, keepdims=True), 1)
        x = x - jnp.where(where, x, 0).sum(1, keepdims=True) / count
        variance = jnp.where(where, x * x, 0).sum(1, keepdims=True) / count
        return (x * jax.lax.rsqrt(variance + NORM_EPS) * scale + bias).astype(self.dtype)


class _BatchNorm(nn.Module):
    """With the statistics of a checkpoint, which no gradient changes."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, zeros, ones = (x.shape[-1],), nn.initializers.zeros_init(), nn.initializers.ones_init()
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, variance = (
            jax.lax.stop_gradient(self.param(name, init, shape))
            for name, init in (("mean", zeros), ("var", ones))
        )
        factor = scale * jax.lax.rsqrt(variance + NORM_EPS)
        return ((x.astype(jnp.float32) - mean) * factor + bias).astype(self.dtype)


class ConformerAttention(nn.Module):
    """Self-attention with the positions of a Conformer."""

    config: ConformerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, places: jax.Array | None, turned: Rotation | None
    ) -> jax.Array:
        """Attend.

        Args:
          x: [B, T, D].
          mask: bool [B, 1, T, T].
          places: [2T - 1, D], from `distances`, for relative positions.
          turned: from `rotation`, for rotary positions.

        Returns:
          [B, T, D].
        """
        c = self.config
        split = {"n": c.num_heads}

        def project(name: str, inputs: jax.Array, bias: bool = c.use_bias) -> jax.Array:
            out = nn.Dense(x.shape[-1], use_bias=bias, dtype=self.dtype, name=name)(inputs)
            return rearrange(out, "... (n h) -> ... n h", **split)

        looked = x
        if turned is not None:
            looked = rearrange(
                rotate(rearrange(x, "b t (n h) -> b t n h", **split), turned), "b t n h -> b t (n h)"
            )
        query, key, value = project("query", looked), project("key", looked), project("value", x)
        bias = None
        if places is not None:
            shape, init = query.shape[2:], nn.initializers.normal(0.02)
            for_content, for_place = (self.param(k, init, shape) for k in ("content_bias", "place_bias"))
            place = project("place", places, bias=False)
            scores = jnp.einsum("btnh,pnh->bntp", query + for_place.astype(self.dtype), place)
            bias = by_distance(scores) * query.shape[-1] ** -0.5
            query = query + for_content.astype(self.dtype)
        out = rearrange(attention(query, key, value, mask, bias=bias), "b t n h -> b t (n h)")
        close = nn.Dense(x.shape[-1], use_bias=c.use_bias, dtype=self.dtype, kernel_init=CLOSED, name="out")
        return close(out)


def by_distance(scores: jax.Array) -> jax.Array:
    """[..., T, 2T - 1] over the distances T - 1 .. 1 - T -> [..., T, T], where query i and key j have distance i - j.

    The shift of Dai et al. 2019, appendix B.
    """
    *rows, length, count = scores.shape
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(1, 0)])
    shifted = padded.reshape(*rows, count + 1, length)[..., 1:, :]
    return shifted.reshape(*rows, length, count)[..., :length]


class ConformerConvolution(nn.Module):
    """Gate, depthwise convolution, norm, activation."""

    config: ConformerConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """[B, T, D], bool [B, T] -> [B, T, D]."""
        c, width = self.config, x.shape[-1]

        def dense(name: str, features: int, **options) -> nn.Dense:
            return nn.Dense(features, use_bias=c.conv_bias, dtype=self.dtype, name=name, **options)

        x = nn.glu(dense("gate", 2 * width)(x))
        x = jnp.where(real[..., None], x, 0)
        pad = (c.kernel_size - 1) // 2
        depthwise = nn.Conv(
            width, (c.kernel_size,), padding=pad, feature_group_count=width, use_bias=c.conv_bias, dtype=self.dtype,
            name="depthwise",
        )  # fmt: skip
        x = depthwise(x)
        if c.conv_norm == "batch":
            x = _BatchNorm(self.dtype, name="norm")(x)
        else:
            x = layer_norm(NORM_EPS, self.dtype, "norm")(x)
        return dense("out", width, kernel_init=CLOSED)(ACTIVATIONS[c.activation](x))


class ConformerBlock(nn.Module):
    """Half an MLP, attention, convolution, half an MLP, norm (Gulati et al. 2020, section 2)."""

    config: ConformerConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        real: jax.Array,
        mask: jax.Array,
        places: jax.Array | None,
        turned: Rotation | None,
    ) -> tuple[jax.Array, None]:
        """[B, T, D], bool [B, T], and what `ConformerAttention` takes -> [B, T, D], None for `nn.scan`."""
        c = self.config

        def norm(name: str) -> nn.LayerNorm:
            return layer_norm(NORM_EPS, self.dtype, f"{name}_norm")

        def mlp(name: str) -> MLP:
            return MLP(c.mlp_dim, c.activation, use_bias=c.use_bias, dtype=self.dtype, name=name)

        x = self.execution.block_input(x)
        attend = ConformerAttention(c, self.dtype, name="attention")
        convolve = ConformerConvolution(c, self.dtype, name="convolution")
        x = x + 0.5 * mlp("first_mlp")(norm("first_mlp")(x))
        x = x + attend(norm("attention")(x), mask, places, turned)
        x = x + convolve(norm("convolution")(x), real)
        x = x + 0.5 * mlp("second_mlp")(norm("second_mlp")(x))
        return norm("out")(x), None


class Conformer(nn.Module):
    """Front, blocks; with its options the encoders of wav2vec2-Conformer and Parakeet.

    Neither attention nor a convolution reaches past the end of a clip, so how far a window is padded changes nothing.
    """

    config: ConformerConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, audio_values: jax.Array, audio_frames: jax.Array) -> jax.Array:
        """Encode windows.

        Args:
          audio_values: float [N, max_frames, num_mels], log-mel frames or samples.
          audio_frames: int32 [N], real frames of each window.

        Returns:
          [N, num_positions, embed_dim].
        """
        c = self.config
        front = MelFront if isinstance(c.front, MelSubsampling) else WaveformFront
        x = front(c.front, self.dtype, name="front")(audio_values, audio_frames)
        if c.input_norm:
            x = layer_norm(c.norm_eps, self.dtype, "input_norm")(x)
        x = nn.Dense(c.embed_dim, dtype=self.dtype, name="input")(x)
        if c.scale_input:
            x = x * c.embed_dim**0.5
        length = x.shape[1]
        real = _reaches(c.positions_of(audio_frames), length)
        mask = attention_mask(real, real, None, length)
        relative, rotary = c.positions == "relative", c.positions == "rotary"
        places = jnp.asarray(distances(length, c.embed_dim), self.dtype) if relative else None
        turned = None
        if rotary:
            turned = rotation(jnp.arange(length)[None], c.embed_dim // c.num_heads, c.rope_theta, None)
        x = self.execution.constrain(x, "pictures", None, None)
        blocks = stack(ConformerBlock, c.num_layers, *[nn.broadcast] * 4, execution=self.execution)
        blocks = blocks(c, self.dtype, self.execution, name="layers")
        x, _ = blocks(x, real, mask, places, turned)
        return layer_norm(c.norm_eps, self.dtype, "norm")(x) if c.final_norm else x
