"""Image encoders."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mm_jax.models.layers import Activation, EncoderBlock, stack


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a Vision Transformer; image sides are pixels and multiples of patch_size."""

    height: int = 64
    width: int = 64
    patch_size: int = 8
    embed_dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_dim: int = 512
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch_size, self.width // self.patch_size


class VisionTransformer(nn.Module):
    """ViT with learned positions and a final layer norm (Dosovitskiy et al. 2021; the shape of SigLIP's tower)."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Encode pictures.

        Args:
          pixel_values: float [N, H, W, 3], normalised.

        Returns:
          [N, rows * cols, embed_dim], one vector a patch, row by row.
        """
        c = self.config
        p = c.patch_size
        patches = rearrange(pixel_values, "n (h p) (w q) c -> n (h w) (p q c)", p=p, q=p)
        x = nn.Dense(c.embed_dim, dtype=self.dtype, name="patch_embed")(patches)
        positions = self.param("positions", nn.initializers.normal(0.02), (x.shape[1], c.embed_dim))
        x = x + positions.astype(self.dtype)
        block = stack(EncoderBlock, c.num_layers, nn.broadcast)
        x, _ = block(c.num_heads, c.mlp_dim, c.activation, c.norm_eps, self.dtype, name="layers")(x, None)
        return nn.LayerNorm(c.norm_eps, dtype=self.dtype, name="norm")(x)
