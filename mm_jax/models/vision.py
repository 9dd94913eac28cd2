"""Image encoders."""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from mm_jax.models.execution import Execution
from mm_jax.models.interpolation import resize_table
from mm_jax.models.layers import Activation, EncoderBlock, Norm, layer_norm, sincos_2d, stack


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and options of a Vision Transformer; image sides are pixels and multiples of patch_size.

    Attributes:
      class_token: a learned token in front of the patches; "keep" gives it out as the first feature, "drop" does not.
      patch_bias: bias on the patch embedding.
      pre_norm: layer norm before the first block (CLIP).
      post_norm: layer norm after the last block.
      feature_layers: give out the hidden states after these blocks (0: before the first) side by side in the
        channels, without post_norm, instead of those after the last block.
      stem: channels of 3x3 convolutions in front of the patches, each of which halves the picture; a small tower
        learns shapes from far fewer pictures with them (Xiao et al. 2021, "Early convolutions").
      positions: whether there is a table of learned positions.
      position_init: the learned positions start as small noise or as 2-D sines and cosines, which tell
        neighbours apart from the first step on.
      position_grid: (rows, columns) of the table of positions; a picture of another grid gets them interpolated
        (DINOv2). Empty for that of height and width. smooth_positions: with antialiasing.
      registers: learned tokens without positions behind the class token, given out and dropped with it.
      gated: the blocks' MLP is gated.
      norm: kind of the norms inside the blocks; pre_norm and post_norm are layer norms.
      qkv_bias, qk_norm, layer_scale: of the blocks, see `mm_jax.models.layers.EncoderBlock` (InternViT).
    """

    height: int = 64
    width: int = 64
    patch_size: int = 8
    embed_dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_dim: int = 512
    stem: tuple[int, ...] = ()
    positions: bool = True
    position_init: Literal["normal", "sincos"] = "normal"
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6
    class_token: Literal["none", "drop", "keep"] = "none"
    patch_bias: bool = True
    pre_norm: bool = False
    post_norm: bool = True
    feature_layers: tuple[int, ...] = ()
    norm: Norm = "layer"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    position_grid: tuple[int, ...] = ()
    smooth_positions: bool = False
    registers: int = 0
    gated: bool = False

    @property
    def inputs(self) -> dict[str, tuple[int, int]]:
        """The pictures that it takes: their names in a batch, and (height, width)."""
        return {"pixel_values": (self.height, self.width)}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch_size, self.width // self.patch_size

    @property
    def num_positions(self) -> int:
        """Patches, class token and registers."""
        return self.grid[0] * self.grid[1] + (self.class_token != "none") + self.registers

    @property
    def feature_grid(self) -> tuple[int, int]:
        """Rows and columns of features that come out; a kept class token leaves no grid, but a sequence."""
        return (self.num_positions, 1) if self.class_token == "keep" else self.grid

    @property
    def feature_dim(self) -> int:
        """Channels of a feature."""
        return self.embed_dim * (len(self.feature_layers) or 1)


class VisionTransformer(nn.Module):
    """ViT with learned positions (Dosovitskiy et al. 2021); with its options the towers of CLIP and SigLIP."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Encode pictures.

        Args:
          pixel_values: float [N, H, W, 3], normalised; H and W those of the config, or any multiples of the patch with
            a position_grid.

        Returns:
          [N, features, feature_dim], one vector a patch, row by row, after that of a kept class token and registers.
        """
        c = self.config
        x = pixel_values
        grid = (x.shape[1] // c.patch_size, x.shape[2] // c.patch_size)
        for k, channels in enumerate(c.stem):
            x = nn.Conv(channels, (3, 3), (2, 2), padding=1, dtype=self.dtype, name=f"stem_conv{k}")(x)
            x = nn.relu(layer_norm(c.norm_eps, self.dtype, f"stem_norm{k}")(x))
        p = c.patch_size // 2 ** len(c.stem)
        x = x[:, : grid[0] * p, : grid[1] * p]  # what is left beside whole patches is not seen
        patches = rearrange(x, "n (h p) (w q) c -> n (h w) (p q c)", p=p, q=p)
        x = nn.Dense(c.embed_dim, use_bias=c.patch_bias, dtype=self.dtype, name="patch_embed")(patches)
        if c.class_token != "none":
            token = self.param("class_token", nn.initializers.normal(0.02), (c.embed_dim,))
            x = jnp.concatenate([repeat(token.astype(self.dtype), "d -> n 1 d", n=x.shape[0]), x], axis=1)
        if c.positions:
            table = tuple(c.position_grid) or grid
            first = x.shape[1] - grid[0] * grid[1]
            shape = (first + table[0] * table[1], c.embed_dim)
            positions = self.param("positions", self._first_positions, shape)
            if table != grid:
                resized = resize_table(positions[first:], table, grid, c.smooth_positions)
                positions = jnp.concatenate([positions[:first], resized.astype(positions.dtype)])
            x = x + positions.astype(self.dtype)
        if c.registers:
            shape = (c.registers, c.embed_dim)
            registers = self.param("registers", nn.initializers.normal(0.02), shape).astype(self.dtype)
            registers = repeat(registers, "r d -> n r d", n=x.shape[0])
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        if c.pre_norm:
            x = layer_norm(c.norm_eps, self.dtype, "pre_norm")(x)
        several = bool(c.feature_layers)
        block = stack(EncoderBlock, c.num_layers, nn.broadcast, execution=self.execution)(
            c.num_heads, c.mlp_dim, c.activation, c.norm_eps, self.dtype, several, c.norm, c.qkv_bias, c.qk_norm,
            c.layer_scale, gated=c.gated, execution=self.execution, name="layers",
        )  # fmt: skip
        before = x = self.execution.constrain(x, "pictures", None, None)
        x, states = block(x, None)
        if several:
            x = jnp.concatenate([states[k - 1] if k else before for k in c.feature_layers], axis=-1)
        elif c.post_norm:
            x = layer_norm(c.norm_eps, self.dtype, "norm")(x)
        return x[:, 1 + c.registers :] if c.class_token == "drop" else x

    def _first_positions(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """[class token and patches, embed_dim]; the class token has no place in the picture."""
        c = self.config
        if c.position_init == "normal":
            return nn.initializers.normal(0.02)(key, shape)
        table = jnp.asarray(sincos_2d(tuple(c.position_grid) or c.grid, c.embed_dim))
        return jnp.pad(table, ((shape[0] - len(table), 0), (0, 0)))
