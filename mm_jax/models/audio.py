"""Audio encoders."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from mm_jax.models.attention import attention_mask
from mm_jax.models.layers import ACTIVATIONS, Activation, EncoderBlock, sinusoids, stack


@dataclass(frozen=True)
class AudioEncoderConfig:
    """Sizes of a Whisper-style encoder; max_frames is the number of log-mel frames of one window."""

    num_mels: int = 80
    max_frames: int = 160
    embed_dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_dim: int = 512
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-5

    @property
    def num_positions(self) -> int:
        """Encoder positions of a full window: the second convolution has stride 2."""
        return self.max_frames // 2


class AudioEncoder(nn.Module):
    """Two convolutions, sinusoidal positions, pre-norm blocks, final norm (Radford et al. 2022, Whisper encoder).

    Frames past the end of a clip are hidden from attention, so silence that only pads changes nothing.
    """

    config: AudioEncoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, audio_values: jax.Array, audio_frames: jax.Array) -> jax.Array:
        """Encode windows of log-mel features.

        Args:
          audio_values: float [N, max_frames, num_mels], log-mel, zero where padded.
          audio_frames: int32 [N], real frames of each window.

        Returns:
          [N, max_frames // 2, embed_dim].
        """
        c = self.config
        activate = ACTIVATIONS[c.activation]
        real = (jnp.arange(audio_values.shape[1]) < audio_frames[:, None])[..., None]
        x = jnp.where(real, audio_values, 0)  # a convolution looks one frame past the end
        x = activate(nn.Conv(c.embed_dim, (3,), padding=1, dtype=self.dtype, name="conv1")(x))
        x = jnp.where(real, x, 0)
        x = activate(nn.Conv(c.embed_dim, (3,), (2,), padding=1, dtype=self.dtype, name="conv2")(x))
        x = x + jnp.asarray(sinusoids(x.shape[1], c.embed_dim), self.dtype)
        real = (jnp.arange(x.shape[1]) < ((audio_frames + 1) // 2)[:, None]).astype(jnp.int32)
        mask = attention_mask(real, real, None, x.shape[1])
        block = stack(EncoderBlock, c.num_layers, nn.broadcast)
        x, _ = block(c.num_heads, c.mlp_dim, c.activation, c.norm_eps, self.dtype, name="layers")(x, mask)
        return nn.LayerNorm(c.norm_eps, dtype=self.dtype, name="norm")(x)
