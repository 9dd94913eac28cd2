"""The decoder-only language model."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from mm_jax.models.attention import window_mask
from mm_jax.models.layers import MLP, Activation, Attention, stack
from mm_jax.models.rotary import RopeScaling, Rotation, rotation


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a Llama-shaped decoder.

    Attributes:
      num_kv_heads: fewer than num_heads for grouped-query attention.
      tie_embeddings: read the logits off the embedding table instead of a separate head.
      qk_norm: RMS norm on query and key heads (Qwen3).
      rope_scaling: how rotary frequencies are stretched for long texts.
      qkv_bias: biases on query, key and value (Qwen2); out_bias, mlp_bias: on the other projections.
      windows: for each layer, how many tokens back it looks, itself included; 0 for all. Empty: every layer sees all.
    """

    vocab_size: int = 1024
    embed_dim: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    mlp_dim: int = 512
    activation: Activation = "silu"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    windows: tuple[int, ...] = ()


Cache = dict[str, jax.Array]


def init_cache(config: DecoderConfig, rows: int, length: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """An empty KV cache: key and value [layers, rows, length, kv_heads, head_dim], segment_ids [rows, length]."""
    shape = (config.num_layers, rows, length, config.num_kv_heads, config.head_dim)
    return {
        "key": jnp.zeros(shape, dtype),
        "value": jnp.zeros(shape, dtype),
        "segment_ids": jnp.zeros((rows, length), jnp.int32),
    }


class DecoderBlock(nn.Module):
    """Pre-norm block: RMS norm, rotary grouped-query attention, RMS norm, gated MLP (Touvron et al. 2023)."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        window: jax.Array | None,
        mask: jax.Array,
        turned: Rotation,
        slots: jax.Array,
        starts: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """[B, T, D] and this layer's cache and window -> [B, T, D] and the cache, advanced."""
        c = self.config
        if window is not None:
            mask = window_mask(mask, slots, window)
        attend = Attention(
            c.num_heads, c.num_kv_heads, c.head_dim, c.qkv_bias, c.out_bias, c.qk_norm, c.norm_eps, self.dtype,
            name="attention",
        )  # fmt: skip
        y = nn.RMSNorm(c.norm_eps, dtype=self.dtype, name="attention_norm")(x)
        y, cache = attend(y, mask=mask, turned=turned, cache=cache, starts=starts)
        x = x + y
        mlp = MLP(c.mlp_dim, c.activation, gated=True, use_bias=c.mlp_bias, dtype=self.dtype, name="mlp")
        return x + mlp(nn.RMSNorm(c.norm_eps, dtype=self.dtype, name="mlp_norm")(x)), cache


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head, as three methods so that media can be spliced in between."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(c.embed_dim**-0.5)
        self.embedding = nn.Embed(c.vocab_size, c.embed_dim, dtype=self.dtype, embedding_init=init)
        self.layers = stack(DecoderBlock, c.num_layers, 0, 0, *[nn.broadcast] * 4)(c, self.dtype)
        self.norm = nn.RMSNorm(c.norm_eps, dtype=self.dtype)
        if not c.tie_embeddings:
            self.head = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D]."""
        return self.embedding(tokens)

    def hidden(
        self,
        x: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        cache: Cache | None = None,
        starts: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Run the blocks and the final norm.

        Args:
          x: [B, T, D] embeddings with media spliced in.
          mask: bool [B, 1, T, S], S = T or the cache length.
          positions: int32 [B, T].
          cache: from `init_cache`; its keys and values are advanced, its segment ids are the caller's.
          starts: int32 [B], see `Attention`.

        Returns:
          [B, T, D] and the advanced cache.
        """
        c = self.config
        layers = None if cache is None else (cache["key"], cache["value"])
        windows = jnp.asarray(c.windows, jnp.int32) if any(c.windows) else None
        turned = rotation(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        slots = jnp.arange(x.shape[1])[None] + (0 if starts is None else starts[:, None])
        x, layers = self.layers(x, layers, windows, mask, turned, slots, starts)
        if cache is not None:
            cache = cache | {"key": layers[0], "value": layers[1]}
        return self.norm(x), cache

    def logits(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, vocab]."""
        out = self.embedding.attend(x) if self.config.tie_embeddings else self.head(x)
        return out.astype(jnp.float32)
