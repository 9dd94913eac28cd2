"""The one attention entry of the library."""

import jax
import jax.numpy as jnp


def attention_mask(
    query_segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
    query_slots: jax.Array | None,
    num_keys: int,
) -> jax.Array | None:
    """Who may look at whom, as bool [B, 1, T, S]; None when everybody sees everything.

    Args:
      query_segment_ids: int32 [B, T]; a query sees only keys with its own segment id.
      key_segment_ids: int32 [B, S].
      query_slots: int32 [B, T], the slot of each query on the key axis; given, attention is causal: a query
        sees keys at slots up to and including its own. Slots are places in the row (or in the KV cache), not
        positions: with M-RoPE positions repeat, slots never do.
      num_keys: S.
    """
    mask = None
    if query_segment_ids is not None:
        mask = query_segment_ids[:, :, None] == key_segment_ids[:, None, :]
    if query_slots is not None:
        causal = jnp.arange(num_keys)[None, None, :] <= query_slots[:, :, None]
        mask = causal if mask is None else mask & causal
    return None if mask is None else mask[:, None]


def block_mask(
    query_segment_ids: jax.Array,
    key_segment_ids: jax.Array,
    query_blocks: jax.Array,
    key_blocks: jax.Array,
) -> jax.Array:
    """Whom tokens see besides what causal attention shows them, as bool [B, 1, T, S].

    Args:
      query_segment_ids, query_blocks: int32 [B, T]; tokens with the same block number above 0 in the same segment see
        each other whatever their order.
      key_segment_ids, key_blocks: int32 [B, S].
    """
    same = query_blocks[:, :, None] == key_blocks[:, None, :]
    same &= query_segment_ids[:, :, None] == key_segment_ids[:, None, :]
    return (same & (query_blocks > 0)[:, :, None])[:, None]


def window_mask(mask: jax.Array, query_slots: jax.Array, window: jax.Array) -> jax.Array:
    """`mask` of causal attention, narrowed to the last `window` slots of each query, its own included.

    Args:
      mask: bool [B, 1, T, S].
      query_slots: int32 [B or 1, T].
      window: int32 []; 0 for no limit.
    """
    distance = query_slots[:, None, :, None] - jnp.arange(mask.shape[-1])
    return mask & ((distance < window) | (window == 0))


def write_slots(old: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    """A cache [B, L, ...] with `new` [B, T, ...] from slot starts[b] (int32 [B]) on.

    Several tokens must fit into the cache; a single one whose slot lies outside is dropped.
    """
    new = new.astype(old.dtype)
    if new.shape[1] == 1:
        return old.at[jnp.arange(old.shape[0]), starts].set(new[:, 0], mode="drop")
    write = jax.vmap(lambda old, new, start: jax.lax.dynamic_update_slice_in_dim(old, new, start, 0))
    return write(old, new, starts)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    scale: float | None = None,
    cap: float = 0.0,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads (Vaswani et al. 2017; Ainslie et al. 2023).

    Softmax runs in float32. A query that may see nothing gets a finite, meaningless row: such rows are padding.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H] with K dividing N; head n reads key/value head n // (N // K).
      mask: bool [B or 1, 1, T, S], from `attention_mask`.
      scale: factor on query x key; None for H ** -0.5.
      cap: bound of the logits, cap * tanh(logits / cap) (Gemma-2); 0 for none.
      bias: [B or 1, N, T, S], added to the logits; not together with a cap.

    Returns:
      [B, T, N, H] in the dtype of `query`.
    """
    if cap:
        if bias is not None:
            raise ValueError("bias and cap do not go together")
        weights = attention_weights(query, key, mask, scale, cap).astype(query.dtype)
        value = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
        return jnp.einsum("bnts,bsnh->btnh", weights, value)
    return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale, implementation="xla")


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> jax.Array:
    """The probabilities that `attention` uses: float32 [B, N, T, S]."""
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5 if scale is None else scale
    if cap:
        logits = cap * jnp.tanh(logits / cap)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)
