"""A Vision Transformer over all tiles of a picture together."""

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from mm_jax.models.execution import Execution
from mm_jax.models.layers import Activation, EncoderBlock, layer_norm, stack

ROUND = 8  # a tile's tokens are filled up to a multiple of it
END_EPS = 1e-5  # of the norms before and behind the blocks


@dataclass(frozen=True)
class TiledViTConfig:
    """Sizes of the tower of Llama-3.2-Vision.

    Attributes:
      height, width: of a tile, in pixels.
      tiles: that a picture may have.
      shapes: grids of tiles that there are; pictures say theirs by a number from 1 on, 0 is for none.
      num_global_layers: gated blocks behind the others.
      taps: give out the states behind these of the first blocks (from 0 on) as well, in the channels behind the last.
    """

    height: int = 448
    width: int = 448
    patch_size: int = 14
    tiles: int = 4
    shapes: int = 8
    embed_dim: int = 1280
    num_layers: int = 32
    num_global_layers: int = 8
    num_heads: int = 16
    mlp_dim: int = 5120
    activation: Activation = "gelu"
    norm_eps: float = 1e-5
    taps: tuple[int, ...] = (3, 7, 15, 23, 30)

    @property
    def inputs(self) -> dict[str, tuple[int, int]]:
        """The pictures that it takes, tile by tile: their names in a batch, and (height, width)."""
        return {"pixel_values": (self.height, self.width)}

    @property
    def arrays(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """(name, shape, dtype) of what it takes of one picture, in the order of its arguments."""
        return (
            ("pixel_values", (self.tiles, self.height, self.width, 3), "float32"),
            ("tile_shapes", (), "int32"),
            ("tile_counts", (), "int32"),
        )

    @property
    def num_positions(self) -> int:
        """Patches of a tile, and its class token."""
        return (self.height // self.patch_size) * (self.width // self.patch_size) + 1

    @property
    def feature_grid(self) -> tuple[int, int]:
        """Features are a sequence: those of each tile, the class token first."""
        return (self.tiles * self.num_positions, 1)

    @property
    def feature_dim(self) -> int:
        """Channels of a feature."""
        return self.embed_dim * (1 + len(self.taps))


class TiledViT(nn.Module):
    """Blocks that see all tiles of a picture, then gated ones (Dubey et al. 2024, section 7.1; reference:
    MllamaVisionModel).

    Tiles that a picture does not have, and what fills up a tile's tokens, are not looked at by each other, but by what
    is real: the released weights have learned with it.
    """

    config: TiledViTConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, pixel_values: jax.Array, tile_shapes: jax.Array, tile_counts: jax.Array) -> jax.Array:
        """Encode pictures.

        Args:
          pixel_values: float [N, tiles, H, W, 3], normalised.
          tile_shapes: int32 [N], the number of the grid of tiles.
          tile_counts: int32 [N], tiles that are real, the first ones.

        Returns:
          [N, tiles * num_positions, feature_dim].
        """
        c, p = self.config, self.config.patch_size
        init = nn.initializers.normal(c.embed_dim**-0.5)

        def gate(name: str) -> jax.Array:
            return jnp.tanh(self.param(name, nn.initializers.zeros_init(), (1,))).astype(self.dtype)

        def of_tiles(name: str, *shape: int) -> jax.Array:
            table = self.param(name, init, (c.shapes + 1, c.tiles, *shape, c.embed_dim))
            taken = table[tile_shapes].astype(self.dtype)
            return taken if shape else taken[:, :, None]

        patches = rearrange(pixel_values, "n t (h p) (w q) c -> n t (h w) (p q c)", p=p, q=p)
        x = nn.Dense(c.embed_dim, use_bias=False, dtype=self.dtype, name="patch_embed")(patches)
        x = x + gate("before_gate") * of_tiles("before_tiles")
        token = self.param("class_token", init, (c.embed_dim,)).astype(self.dtype)
        x = jnp.concatenate([repeat(token, "d -> n t 1 d", n=x.shape[0], t=c.tiles), x], axis=2)
        positions = self.param("positions", init, (c.num_positions, c.embed_dim)).astype(self.dtype)
        opened = gate("positions_gate")
        x = x + (1 - opened) * positions + opened * of_tiles("tile_positions", c.num_positions)
        x = layer_norm(END_EPS, self.dtype, "pre_norm")(x)
        padding = -c.num_positions % ROUND
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0)))
        real = jnp.arange(c.tiles)[None, :, None] < tile_counts[:, None, None]
        real = rearrange(real & (jnp.arange(x.shape[2]) < c.num_positions), "n t p -> n (t p)")
        mask = (real[:, :, None] | real[:, None, :])[:, None]

        def blocks(x: jax.Array, length: int, name: str, **options) -> tuple[jax.Array, jax.Array | None]:
            x = rearrange(x, "n t p d -> n (t p) d")
            block = stack(EncoderBlock, length, nn.broadcast, execution=self.execution)(
                c.num_heads, c.mlp_dim, c.activation, c.norm_eps, self.dtype, qkv_bias=False, out_bias=False,
                execution=self.execution, name=name, **options,
            )  # fmt: skip
            x, states = block(self.execution.constrain(x, "pictures", None, None), mask)
            return rearrange(x, "n (t p) d -> n t p d", t=c.tiles), states

        x, states = blocks(x, c.num_layers, "layers", collect=bool(c.taps))
        x = layer_norm(END_EPS, self.dtype, "post_norm")(x)
        x = x + gate("after_gate") * of_tiles("after_tiles")
        x, _ = blocks(x, c.num_global_layers, "global_layers", branch_gate=math.pi / 4)
        if c.taps:
            tapped = rearrange(states[jnp.asarray(c.taps)], "k n (t p) d -> n t p (d k)", t=c.tiles)
            x = jnp.concatenate([x, tapped], axis=-1)
        return rearrange(x[:, :, : c.num_positions], "n t p d -> n (t p) d")
