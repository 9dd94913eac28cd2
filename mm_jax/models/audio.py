"""Whisper's audio encoder."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import reduce

from mm_jax.models.attention import row_mask
from mm_jax.models.execution import Execution
from mm_jax.models.layers import ACTIVATIONS, Activation, EncoderBlock, layer_norm, sinusoids, stack


@dataclass(frozen=True)
class AudioEncoderConfig:
    """Sizes of a Whisper-style encoder; max_frames is the number of log-mel frames of one window.

    Attributes:
      positions: sines and cosines, or a learned table.
      conv_activation: of the convolutions, None for the same as in the blocks.
      key_bias: bias on the key projections; Whisper has none.
      mask_frames: the convolutions see zeros past the end of a clip; else what the array holds there, which is the
        log-mel of silence from Whisper's processor.
      pool: means over so many neighbouring positions come out, instead of all (Qwen2-Audio).
    """

    num_mels: int = 80
    max_frames: int = 160
    embed_dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_dim: int = 512
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-5
    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    conv_activation: Activation | None = None
    key_bias: bool = True
    mask_frames: bool = True
    pool: int = 1

    @property
    def num_positions(self) -> int:
        """Encoder positions of a full window."""
        return self.positions_of(self.max_frames)

    @property
    def feature_dim(self) -> int:
        """Channels of a position."""
        return self.embed_dim

    def positions_of(self, frames):
        """Encoder positions of so many frames, int or array: the second convolution has stride 2."""
        return (frames + 1) // 2 // self.pool


class AudioEncoder(nn.Module):
    """Two convolutions, positions, pre-norm blocks, final norm (Radford et al. 2022, Whisper encoder).

    Attention does not reach past the end of a clip. Whisper itself listens to the silence that fills its windows up:
    there every window has max_frames real frames.
    """

    config: AudioEncoderConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, audio_values: jax.Array, audio_frames: jax.Array) -> jax.Array:
        """Encode windows of log-mel features.

        Args:
          audio_values: float [N, max_frames, num_mels], log-mel.
          audio_frames: int32 [N], real frames of each window.

        Returns:
          [N, num_positions, embed_dim].
        """
        c = self.config
        activate = ACTIVATIONS[c.conv_activation or c.activation]
        real = (jnp.arange(audio_values.shape[1]) < audio_frames[:, None])[..., None]

        def heard(x: jax.Array) -> jax.Array:
            return jnp.where(real, x, 0) if c.mask_frames else x

        x = heard(audio_values)  # a convolution looks one frame past the end
        x = activate(nn.Conv(c.embed_dim, (3,), padding=1, dtype=self.dtype, name="conv1")(x))
        x = heard(x)
        x = activate(nn.Conv(c.embed_dim, (3,), (2,), padding=1, dtype=self.dtype, name="conv2")(x))
        table = jnp.asarray(sinusoids(x.shape[1], c.embed_dim))
        if c.positions == "learned":
            table = self.param("positions", lambda _: table)
        x = x + table.astype(self.dtype)
        real = (jnp.arange(x.shape[1]) < ((audio_frames + 1) // 2)[:, None]).astype(jnp.int32)
        x = self.execution.constrain(x, "pictures", None, None)
        block = stack(EncoderBlock, c.num_layers, nn.broadcast, execution=self.execution)
        x, _ = block(
            c.num_heads, c.mlp_dim, c.activation, c.norm_eps, self.dtype, key_bias=c.key_bias,
            execution=self.execution, name="layers",
        )(x, row_mask(real, causal=False))  # fmt: skip
        if c.pool > 1:
            x = reduce(x[:, : c.num_positions * c.pool], "n (t p) d -> n t d", "mean", p=c.pool)
        return layer_norm(c.norm_eps, self.dtype, "norm")(x)
