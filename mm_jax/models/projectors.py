"""Projectors: encoder features -> pseudo-tokens of the decoder's width. Peers behind one interface."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from mm_jax.models.layers import (
    ACTIVATIONS,
    MLP,
    NORMS,
    Activation,
    Attention,
    Norm,
    layer_norm,
    sincos_2d,
    sincos_of,
)


@dataclass(frozen=True)
class ProjectorConfig:
    """Which projector and its sizes.

    Attributes:
      kind: "linear", "mlp" (one hidden layer), "resampler" (learned queries, cross-attention) or "branches" (a map for
        the channels of each encoder, then one for all).
      merge: linear and mlp first lay blocks of rows x columns neighbouring features side by side, so that a
        grid of R x C features gives (R // rows) * (C // columns) tokens. An audio sequence is a grid T x 1.
      hidden_dim: width of the hidden layer of the mlp and of the resampler's attention.
      num_queries, num_heads: of the resampler; it gives num_queries tokens whatever the grid.
      order: linear and mlp give their tokens row by row or column by column (the first InternVL with pixel shuffle).
      norm: of linear and mlp, before the maps: of what has been merged or, with norm_each, of each feature before it
        is merged.
      norm_kind, norm_eps: of that norm.
      use_bias: biases on the maps of linear and mlp.
      residual: the resampler adds its queries to what they read, and an MLP follows.
      input_map: a linear map in front of the resampler's keys and values.
      branch_dims: of "branches": how the channels divide.
    """

    kind: Literal["linear", "mlp", "resampler", "branches"] = "mlp"
    merge: tuple[int, int] = (1, 1)
    hidden_dim: int = 256
    num_queries: int = 16
    num_heads: int = 4
    activation: Activation = "gelu_tanh"
    order: Literal["rows", "columns"] = "rows"
    norm: bool = True
    norm_each: bool = False
    norm_kind: Norm = "layer"
    use_bias: bool = True
    norm_eps: float = 1e-6
    residual: bool = True
    input_map: bool = True
    branch_dims: tuple[int, ...] = ()

    def merged_dim(self, feature_dim: int) -> int:
        """Channels of what linear and mlp merge."""
        return feature_dim * self.merge[0] * self.merge[1]

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Tokens that come out of a grid of (rows, columns) features."""
        if self.kind == "resampler":
            return self.num_queries
        return (grid[0] // self.merge[0]) * (grid[1] // self.merge[1])


class MLPProjector(nn.Module):
    """Merge neighbours, normalise if asked to, then a linear map or a two-layer MLP.

    Liu et al. 2023 (LLaVA-1.5); with the merge, which is also called pixel shuffle, the `mlp1` of InternVL.
    """

    config: ProjectorConfig
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, grid: tuple[int, int] | None, mask: jax.Array | None = None
    ) -> jax.Array:
        """[N, rows * cols, C] -> [N, tokens, features].

        Args:
          grid: None for what is merged already, [N, tokens, merged_dim].
          mask: accepted for the common interface.
        """
        c = self.config
        order = {"rows": "h w", "columns": "w h"}[c.order]
        norm = NORMS[c.norm_kind](c.norm_eps, self.dtype, "norm")
        if c.norm and c.norm_each:
            x = norm(x)
        if grid is not None:
            x = rearrange(
                x, f"n (h a w b) c -> n ({order}) (a b c)", h=grid[0] // c.merge[0], a=c.merge[0], b=c.merge[1],
                w=grid[1] // c.merge[1],
            )  # fmt: skip
        if c.norm and not c.norm_each:
            x = norm(x)
        if c.kind == "mlp":
            hidden = nn.Dense(c.hidden_dim, use_bias=c.use_bias, dtype=self.dtype, name="hidden")
            x = ACTIVATIONS[c.activation](hidden(x))
        return nn.Dense(self.features, use_bias=c.use_bias, dtype=self.dtype, name="out")(x)


class Resampler(nn.Module):
    """Learned queries that read the features by cross-attention, then an MLP (Qwen-VL section 2.1; MiniCPM-V).

    Keys carry 2-D sine-cosine positions, values do not, so a query can look for a place and bring what is there.
    """

    config: ProjectorConfig
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        grid: tuple[int, int] | None,
        mask: jax.Array | None = None,
        places: jax.Array | None = None,
    ) -> jax.Array:
        """[N, S, C] -> [N, num_queries, features].

        Args:
          grid: S as rows * cols.
          mask: bool [N, S], real features.
          places: int32 [N, S, 2], row and column of each feature, in place of a grid.
        """
        c = self.config
        width = c.hidden_dim

        def norm(name: str) -> nn.LayerNorm:
            return layer_norm(c.norm_eps, self.dtype, name)

        if c.input_map:
            x = nn.Dense(width, use_bias=c.use_bias, dtype=self.dtype, name="input")(x)
        x = norm("input_norm")(x)
        query = self.param("query", nn.initializers.normal(0.02), (c.num_queries, width))
        query = repeat(query.astype(self.dtype), "q d -> n q d", n=x.shape[0])
        places = sincos_2d(grid, width) if places is None else sincos_of(places, width)
        places = jnp.asarray(places, self.dtype)
        attend = Attention(c.num_heads, c.num_heads, width // c.num_heads, dtype=self.dtype, name="attention")
        mask = None if mask is None else mask[:, None, None, :]
        y = attend(norm("query_norm")(query), context=x, mask=mask, key_places=places)[0]
        if c.residual:
            y = query + y
            mlp = MLP(2 * width, c.activation, dtype=self.dtype, name="mlp")
            y = y + mlp(norm("mlp_norm")(y))
        return nn.Dense(self.features, use_bias=c.use_bias, dtype=self.dtype, name="out")(norm("out_norm")(y))


class BranchProjector(nn.Module):
    """Features of several encoders, side by side in the channels: each is mapped to an equal share of the width, then
    all together (DeepSeek-VL section 2.2; reference: DeepseekVLHybridAligner)."""

    config: ProjectorConfig
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int], mask: jax.Array | None = None) -> jax.Array:
        """[N, rows * cols, C] -> [N, rows * cols, features]. `grid`, `mask`: accepted for the common interface."""
        c = self.config
        share = self.features // len(c.branch_dims)
        parts = jnp.split(x, list(accumulate(c.branch_dims))[:-1], axis=-1)
        x = jnp.concatenate(
            [nn.Dense(share, dtype=self.dtype, name=f"branch{k}")(part) for k, part in enumerate(parts)],
            axis=-1,
        )
        return nn.Dense(self.features, dtype=self.dtype, name="out")(ACTIVATIONS[c.activation](x))


PROJECTORS = {
    "linear": MLPProjector,
    "mlp": MLPProjector,
    "resampler": Resampler,
    "branches": BranchProjector,
}
