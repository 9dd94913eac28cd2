"""Linear attention by the gated delta rule: layers that remember the text so far in one matrix a head."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mm_jax.models.execution import Execution
from mm_jax.models.layers import CLOSED, rms_norm
from mm_jax.models.quantised import Dense

CHUNK = 64  # tokens that are read at once
EXACT = jax.lax.Precision.HIGHEST  # what is written is a small difference of what is known and what is seen

# What a layer remembers of B rows: the last inputs of its convolution [B, kernel_size - 1, channels], and float32
# [B, value_heads, key_dim, value_dim].
Memory = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class DeltaConfig:
    """Sizes of `GatedDelta`.

    Attributes:
      num_key_heads, key_dim: of queries and keys; num_value_heads, value_dim: of values. Each head of a key serves
        several of values, one after the other.
      kernel_size: tokens that the convolution in front spans.
    """

    num_key_heads: int = 16
    num_value_heads: int = 32
    key_dim: int = 128
    value_dim: int = 128
    kernel_size: int = 4

    @property
    def widths(self) -> dict[str, int]:
        """Channels of queries, keys and values."""
        keys = self.num_key_heads * self.key_dim
        return {"query": keys, "key": keys, "value": self.num_value_heads * self.value_dim}

    @property
    def channels(self) -> int:
        """Of all of them together."""
        return sum(self.widths.values())

    def memory(self, rows: int, dtype: jnp.dtype) -> Memory:
        """Of texts that have not begun."""
        state = rows, self.num_value_heads, self.key_dim, self.value_dim
        return jnp.zeros((rows, self.kernel_size - 1, self.channels), dtype), jnp.zeros(state, jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Texts:
    """Which text each of T tokens of B rows belongs to.

    Attributes:
      numbers: int32 [B, T], rising along a row; 0 is the text that the memory is of. Padding has the number of what
        stands before it.
      real: bool [B, T], tokens that are no padding.
      begun: bool [B], the memory counts; else the row starts anew.
    """

    numbers: jax.Array
    real: jax.Array
    begun: jax.Array

    @classmethod
    def of(cls, segment_ids: jax.Array, starts: jax.Array | None = None) -> Texts:
        """From int32 [B, T], 0 for padding; starts: int32 [B], tokens of each row that have been read before."""
        rows, length = segment_ids.shape
        real = segment_ids > 0
        newest = jax.lax.cummax(jnp.where(real, jnp.arange(length), -1), axis=1)
        before = jnp.pad(newest, ((0, 0), (1, 0)), constant_values=-1)[:, :length]
        previous = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
        begins = real & (before >= 0) & (previous != segment_ids)
        begun = jnp.zeros(rows, bool) if starts is None else starts > 0
        return cls(jnp.cumsum(begins.astype(jnp.int32), axis=1), real, begun)


def short_convolution(
    x: jax.Array, kernel: jax.Array, texts: Texts, tail: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A causal convolution of every channel with its own kernel, which does not reach into other texts.

    Args:
      x: [B, T, C], zeros for padding.
      kernel: [K, C], the newest token last.
      tail: [B, K - 1, C], inputs before x.

    Returns:
      [B, T, C], and the tail behind the last token that is no padding; padding may stand on the right alone for it.
    """
    length, before = x.shape[1], len(kernel) - 1
    inputs = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    numbers = jnp.pad(texts.numbers, ((0, 0), (before, 0)))
    out = jnp.zeros_like(x)
    for k in range(before + 1):
        here = numbers[:, k : k + length] == texts.numbers
        out += jnp.where(here[..., None], inputs[:, k : k + length], 0) * kernel[k]
    places = jnp.sum(texts.real, axis=1, keepdims=True) + jnp.arange(before)
    kept = jnp.take_along_axis(numbers, places, axis=1) == texts.numbers[:, -1:]
    tail = jnp.take_along_axis(inputs, places[..., None], axis=1)
    return out, jnp.where(kept[..., None], tail, 0)


def _inverse(lower: jax.Array) -> jax.Array:
    """The inverse of 1 + lower, for strictly lower triangular [..., C, C].

    By blocks of 1, 2, 4, ...: products of matrices alone, which accelerators are made for, and as exact as
    substitution, unlike powers of `lower`.
    """
    size = lower.shape[-1]
    found, block = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape), 1
    while block < size:
        pair, second = np.divmod(np.arange(size) // block, 2)
        joins = (pair[:, None] == pair) & (second[:, None] == 1) & (second == 0)
        below = jnp.matmul(jnp.where(joins, lower, 0), found, precision=EXACT)
        found = found - jnp.matmul(found, below, precision=EXACT)
        block *= 2
    return found


def gated_delta(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    decay: jax.Array,
    rate: jax.Array,
    numbers: jax.Array,
    state: jax.Array,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """S <- exp(decay) S; S <- S + rate * key (value - S' key)'; out = S' query: for one token after the other (Yang et
    al. 2024, "Gated Delta Networks", equation 10), from S = 0 in every text.

    Computed a chunk of tokens at a time: within it as products of matrices (section 3.3), and S goes from one to the
    next. Chunks of one token are the rule as it stands; how long they are changes nothing.

    Args:
      query, key: float32 [B, T, K, D]; value: float32 [B, T, N, V], K divides N.
      decay, rate: float32 [B, T, N], decay at most 0; tokens with zeros for both change nothing.
      numbers: int32 [B, T], see `Texts`.
      state: float32 [B, N, D, V], S of the text 0.

    Returns:
      float32 [B, T, N, V], and S behind the last token.
    """
    length, heads = query.shape[1:3]
    size = min(chunk, length)
    more = -length % size

    def chunks(x: jax.Array, pattern: str, mode: str = "constant") -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return rearrange(x, f"b (n c) {pattern}", c=size, **({"k": heads} if "k" in pattern else {}))

    def product(pattern: str, *arrays: jax.Array) -> jax.Array:
        return jnp.einsum(pattern, *arrays, precision=EXACT)

    query, key = (chunks(x, "k d -> n b k c d") for x in (query, key))
    value = chunks(value, "(k g) v -> n b k g c v")
    decay, rate = (chunks(x, "(k g) -> n b k g c") for x in (decay, rate))
    numbers = chunks(numbers, "-> n b c", "edge")
    last = numbers[..., -1]
    carried = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])  # the text that S is of at first
    fallen = jnp.cumsum(decay, axis=-1)
    together = (numbers[..., :, None] == numbers[..., None, :]) & np.tri(size, dtype=bool)
    between = fallen[..., :, None] - fallen[..., None, :]
    # above the diagonal this would grow without bound
    between = jnp.exp(jnp.where(together[:, :, None, None], between, -jnp.inf))
    reach = jnp.where((numbers == carried[..., None])[:, :, None, None], jnp.exp(fallen), 0)
    keep = (numbers == last[..., None])[:, :, None, None]
    keep = jnp.where(keep, jnp.exp(fallen[..., -1:] - fallen), 0)
    whole = jnp.where((last == carried)[:, :, None, None], jnp.exp(fallen[..., -1]), 0)

    likeness = product("nbkid,nbkjd->nbkij", key, key)[:, :, :, None] * between * rate[..., None]
    solve = _inverse(jnp.where(np.tri(size, k=-1, dtype=bool), likeness, 0))
    new = product("nbkgij,nbkgjv->nbkgiv", solve, value * rate[..., None])
    known = product("nbkgij,nbkgj,nbkjd->nbkgid", solve, rate * reach, key)
    within = product("nbkid,nbkjd->nbkij", query, key)[:, :, :, None] * between

    def step(state: jax.Array, one: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query, key, new, known, within, reach, keep, whole = one
        written = new - product("bkgid,bkgdv->bkgiv", known, state)
        out = product("bkid,bkgdv->bkgiv", query, state) * reach[..., None]
        out += product("bkgij,bkgjv->bkgiv", within, written)
        state = state * whole[..., None, None]
        return state + product("bkid,bkgiv->bkgdv", key, written * keep[..., None]), out

    state = rearrange(state, "b (k g) d v -> b k g d v", k=heads)
    state, out = jax.lax.scan(step, state, (query, key, new, known, within, reach, keep, whole))
    out = rearrange(out, "n b k g c v -> b (n c) (k g) v")[:, :length]
    return out, rearrange(state, "b k g d v -> b (k g) d v")


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _first_rates(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))


class GatedDelta(nn.Module):
    """Linear attention of Qwen3-Next and Qwen3.5 (reference: Qwen3_5GatedDeltaNet): a short convolution over queries,
    keys and values, the gated delta rule in float32, a norm over each head and a gate."""

    config: DeltaConfig
    norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: jax.Array, texts: Texts, memory: Memory | None = None
    ) -> tuple[jax.Array, Memory | None]:
        """Read tokens.

        Args:
          x: [B, T, D].
          texts: which texts they are of.
          memory: of the tokens before; None where there are none, and then none comes out.

        Returns:
          [B, T, D], and what is remembered behind the last token; for it padding may stand on the right alone.
        """
        c = self.config
        keep = memory is not None
        tail, state = memory if keep else c.memory(len(x), x.dtype)
        tail = jnp.where(texts.begun[:, None, None], tail, 0)
        state = jnp.where(texts.begun[:, None, None, None], state, 0)

        def dense(name: str, features: int) -> jax.Array:
            return Dense(features, use_bias=False, dtype=self.dtype, name=name)(x)

        mixed, tails, start = {}, [], 0
        for name, width in c.widths.items():
            kernel = self.param(f"{name}_conv", nn.initializers.lecun_normal(), (c.kernel_size, width))
            inputs = jnp.where(texts.real[..., None], dense(name, width), 0)
            left = tail[..., start : start + width]
            out, left = short_convolution(inputs, kernel.astype(self.dtype), texts, left)
            heads = c.num_value_heads if name == "value" else c.num_key_heads
            out = rearrange(nn.silu(out), "b t (n h) -> b t n h", n=heads)
            # every token needs all that stand before it
            out = self.execution.constrain(out, "batch", None, "kv_heads", None)
            mixed[name] = out.astype(jnp.float32)
            tails.append(left)
            start += width
        rates = self.param("log_rate", _first_rates, (c.num_value_heads,)).astype(jnp.float32)
        bias = self.param("step_bias", nn.initializers.ones_init(), (c.num_value_heads,)).astype(jnp.float32)
        steps = nn.softplus(dense("step", c.num_value_heads).astype(jnp.float32) + bias)
        decay = jnp.where(texts.real[..., None], -jnp.exp(rates) * steps, 0)
        rate = nn.sigmoid(dense("write", c.num_value_heads).astype(jnp.float32))
        rate = jnp.where(texts.real[..., None], rate, 0)
        query, key = _unit(mixed["query"]) * c.key_dim**-0.5, _unit(mixed["key"])
        out, state = gated_delta(query, key, mixed["value"], decay, rate, texts.numbers, state)
        out = rms_norm(self.norm_eps, jnp.float32, "norm")(out)
        out = rearrange(out, "b t n v -> b t (n v)") * nn.silu(
            dense("gate", c.widths["value"]).astype(jnp.float32)
        )
        last = Dense(x.shape[-1], use_bias=False, dtype=self.dtype, kernel_init=CLOSED, name="out")
        out = last(out.astype(self.dtype))
        if not keep:
            return out, None
        return out, (jnp.concatenate(tails, axis=-1).astype(memory[0].dtype), state)
