"""The layers of the querying transformer of BLIP-2 and InstructBLIP."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mm_jax.models.layers import MLP, Activation, Attention, layer_norm


class QFormerBlock(nn.Module):
    """A layer of BERT over queries and text; the queries alone may look at the features (reference: Blip2QFormerLayer).

    Attributes:
      cross: queries read the features by cross-attention.
    """

    num_heads: int
    mlp_dim: int
    activation: Activation
    norm_eps: float
    cross: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: jax.Array,
        text: jax.Array | None,
        mask: jax.Array | None,
        features: jax.Array,
        feature_mask: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Queries [N, Q, D] and text [N, L, D] or None, with features [N, S, C] -> both, one layer on.

        Masks are bool [N, 1, 1, Q + L] and [N, 1, 1, S].
        """

        def add(name: str, x: jax.Array, branch: jax.Array) -> jax.Array:
            return layer_norm(self.norm_eps, self.dtype, name)(x + branch)

        def attention(name: str) -> Attention:
            heads = self.num_heads
            return Attention(heads, heads, queries.shape[-1] // heads, dtype=self.dtype, name=name)

        count = queries.shape[1]
        both = queries if text is None else jnp.concatenate([queries, text], axis=1)
        both = add("attention_norm", both, attention("attention")(both, mask=mask)[0])
        queries = both[:, :count]
        if self.cross:
            read = attention("cross_attention")(queries, context=features, mask=feature_mask)[0]
            queries = add("cross_attention_norm", queries, read)
        mlp = MLP(self.mlp_dim, self.activation, dtype=self.dtype, name="mlp")
        queries = add("mlp_norm", queries, mlp(queries))
        if text is not None:
            mlp = MLP(self.mlp_dim, self.activation, dtype=self.dtype, name="text_mlp")
            text = both[:, count:]
            text = add("text_mlp_norm", text, mlp(text))
        return queries, text


class QFormerGroup(nn.Module):
    """`size` layers, the first of which reads the features: what scan repeats. Attributes as of `QFormerBlock`."""

    size: int
    num_heads: int
    mlp_dim: int
    activation: Activation
    norm_eps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        state: tuple[jax.Array, jax.Array | None],
        mask: jax.Array | None,
        features: jax.Array,
        feature_mask: jax.Array | None,
    ) -> tuple[tuple[jax.Array, jax.Array | None], None]:
        """Queries and text, and the other arguments of `QFormerBlock` -> both, and nothing for scan to collect."""
        for k in range(self.size):
            block = QFormerBlock(
                self.num_heads,
                self.mlp_dim,
                self.activation,
                self.norm_eps,
                k == 0,
                self.dtype,
                name=f"layer{k}",
            )
            state = block(*state, mask, features, feature_mask)
        return state, None
