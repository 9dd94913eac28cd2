"""Projectors: encoder features -> pseudo-tokens of the decoder's width. Peers behind one interface."""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from mm_jax.models.interpolation import resize_table
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
    stack,
)
from mm_jax.models.qformer import QFormerGroup


@dataclass(frozen=True)
class ProjectorConfig:
    """Which projector and its sizes.

    Attributes:
      kind: "linear", "mlp" (one hidden layer), "branches" (a map for the channels of each encoder, then one for all);
        with learned queries "resampler" (cross-attention once), "qformer" (a BERT with cross-attention) or "latent"
        (one attention over features and queries).
      merge: linear and mlp first lay blocks of rows x columns neighbouring features side by side, or take their mean
        (merge_by), so that a grid of R x C features gives (R // rows) * (C // columns) tokens. An audio sequence is a
        grid T x 1.
      hidden_dim: width of the hidden layer of the mlp, of the resampler's attention and of the Q-Former.
      num_queries, num_heads: of those with queries; they give num_queries tokens whatever the grid.
      num_layers, mlp_dim: of the Q-Former; cross_every: its layers 0, cross_every, 2 * cross_every, ... read the
        features, and it divides num_layers.
      text_vocab, text_length: of the instructions that a Q-Former sees beside its queries; 0 for none.
      order: linear and mlp give their tokens row by row or column by column (the first InternVL with pixel shuffle).
      norm: of linear and mlp, before the maps: of what has been merged or, with norm_each, of each feature before it
        is merged.
      norm_kind, norm_eps: of that norm; norm_eps also of the layer norms of the Q-Former.
      use_bias: biases on the maps of linear and mlp.
      residual: the resampler adds its queries to what they read, and an MLP follows.
      input_map: a linear map in front of the resampler's keys and values.
      stored_positions: the resampler's positions are a table of the file, for a square grid of its queries, which carry
        them as well; keys get them stretched to the grid of the features (Qwen-VL). Training leaves them as they are.
      branch_dims: of "branches": how the channels divide.
      scale: factor on the tokens; of "latent" alone.
    """

    kind: Literal["linear", "mlp", "branches", "resampler", "qformer", "latent"] = "mlp"
    merge: tuple[int, int] = (1, 1)
    merge_by: Literal["stack", "mean"] = "stack"
    hidden_dim: int = 256
    num_queries: int = 16
    num_heads: int = 4
    num_layers: int = 4
    mlp_dim: int = 1024
    cross_every: int = 2
    text_vocab: int = 0
    text_length: int = 0
    activation: Activation = "gelu_tanh"
    order: Literal["rows", "columns"] = "rows"
    norm: bool = True
    norm_each: bool = False
    norm_kind: Norm = "layer"
    use_bias: bool = True
    norm_eps: float = 1e-6
    scale: float = 1.0
    residual: bool = True
    input_map: bool = True
    stored_positions: bool = False
    branch_dims: tuple[int, ...] = ()

    def merged_dim(self, feature_dim: int) -> int:
        """Channels of what linear and mlp merge."""
        return feature_dim * self.merge[0] * self.merge[1]

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Tokens that come out of a grid of (rows, columns) features."""
        if self.kind in ("resampler", "qformer", "latent"):
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
                x, f"n (h a w b) c -> n ({order}) (a b) c", h=grid[0] // c.merge[0], a=c.merge[0], b=c.merge[1],
                w=grid[1] // c.merge[1],
            )  # fmt: skip
            x = jnp.mean(x, axis=2) if c.merge_by == "mean" else rearrange(x, "n t m c -> n t (m c)")
        if c.norm and not c.norm_each:
            x = norm(x)
        if c.kind == "mlp":
            hidden = nn.Dense(c.hidden_dim, use_bias=c.use_bias, dtype=self.dtype, name="hidden")
            x = ACTIVATIONS[c.activation](hidden(x))
        return nn.Dense(self.features, use_bias=c.use_bias, dtype=self.dtype, name="out")(x)


class Resampler(nn.Module):
    """Learned queries that read the features by cross-attention, then an MLP (Qwen-VL section 2.1; MiniCPM-V).

    Keys carry 2-D sine-cosine positions, values do not, so a query can look for a place and bring what is there. With
    stored_positions the queries carry them too, each that of its place in a grid of queries.
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
          places: int32 [N, S, 2], row and column of each feature, in place of a grid; not with stored_positions.
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
        asking = norm("query_norm")(query)
        if c.stored_positions:
            square = (math.isqrt(c.num_queries),) * 2
            table = self.param("positions", lambda _: jnp.asarray(sincos_2d(square, width)))
            table = jax.lax.stop_gradient(table)
            asking = asking + table.astype(self.dtype)
            places = resize_table(table, square, grid)
        else:
            places = sincos_2d(grid, width) if places is None else sincos_of(places, width)
        places = jnp.asarray(places, self.dtype)
        attend = Attention(c.num_heads, c.num_heads, width // c.num_heads, dtype=self.dtype, name="attention")
        mask = None if mask is None else mask[:, None, None, :]
        y = attend(asking, context=x, mask=mask, key_places=places)[0]
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


class QFormer(nn.Module):
    """Learned queries read the features through a BERT with cross-attention in every n-th layer; then a linear map.

    Li et al. 2023 (BLIP-2); with an instruction beside the queries Dai et al. 2023 (InstructBLIP).
    """

    config: ProjectorConfig
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        grid: tuple[int, int],
        mask: jax.Array | None = None,
        text: jax.Array | None = None,
    ) -> jax.Array:
        """Read the features of N pictures or clips.

        Args:
          x: [N, S, C]; `grid` is accepted for the common interface.
          mask: bool [N, S], real features.
          text: int32 [N, L], an instruction for each, in the Q-Former's own vocabulary; -1 is padding, on the right.

        Returns:
          [N, num_queries, features].
        """
        c = self.config
        width = c.hidden_dim
        queries = self.param("query", nn.initializers.normal(0.02), (c.num_queries, width))
        queries = repeat(queries.astype(self.dtype), "q d -> n q d", n=x.shape[0])
        norm = layer_norm(c.norm_eps, self.dtype, "input_norm")
        words, seen = None, None
        if c.text_vocab:
            init = nn.initializers.normal(0.02)
            embed = nn.Embed(
                c.text_vocab, width, dtype=self.dtype, embedding_init=init, name="text_embedding"
            )
            places = nn.Embed(
                c.text_length, width, dtype=self.dtype, embedding_init=init, name="text_positions"
            )
            if text is None and self.is_initializing():
                text = jnp.zeros((x.shape[0], 1), jnp.int32)
            if text is not None:
                words = norm(embed(jnp.maximum(text, 0)) + places(jnp.arange(text.shape[1])))
                seen = jnp.pad(text >= 0, ((0, 0), (c.num_queries, 0)), constant_values=True)[:, None, None]
        mask = None if mask is None else mask[:, None, None, :]
        groups = stack(QFormerGroup, c.num_layers // c.cross_every, *[nn.broadcast] * 3)(
            c.cross_every, c.num_heads, c.mlp_dim, c.activation, c.norm_eps, self.dtype, name="layers"
        )
        (queries, _), _ = groups((norm(queries), words), seen, x, mask)
        return nn.Dense(self.features, dtype=self.dtype, name="out")(queries)


class LatentReader(nn.Module):
    """Learned queries that attend once to the features and to each other, nothing around (Kosmos-2).

    Peng et al. 2023; reference: Kosmos2ImageToTextProjection, with the normalisation in front of it.
    """

    config: ProjectorConfig
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, grid: tuple[int, int], mask: jax.Array | None = None) -> jax.Array:
        """[N, S, C], bool [N, S] (real features) -> [N, num_queries, features]."""
        c = self.config
        squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        x = (x * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))).astype(self.dtype)
        x = nn.Dense(self.features, dtype=self.dtype, name="input")(x)
        query = self.param("query", nn.initializers.normal(0.02), (c.num_queries, self.features))
        query = repeat(query.astype(self.dtype), "q d -> n q d", n=x.shape[0])
        context = jnp.concatenate([x, query], axis=1)
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, c.num_queries)), constant_values=True)[:, None, None]
        attend = Attention(
            c.num_heads, c.num_heads, self.features // c.num_heads, dtype=self.dtype, name="attention"
        )
        return attend(query, context=context, mask=mask)[0] * jnp.asarray(c.scale, self.dtype)


PROJECTORS = {
    "linear": MLPProjector,
    "mlp": MLPProjector,
    "resampler": Resampler,
    "branches": BranchProjector,
    "qformer": QFormer,
    "latent": LatentReader,
}
