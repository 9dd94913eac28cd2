"""The one attention entry of the library."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from mm_jax.models import blocks, ring, splash
from mm_jax.models.execution import Execution

Axes = tuple[str, str | None, str, str]  # logical axes of attention: rows, queries, heads, key/value heads
DECODER: Axes = ("batch", "length", "heads", "kv_heads")
ENCODER: Axes = ("pictures", None, "tower_heads", "tower_heads")
NATIVE: Axes = ("batch", None, "tower_heads", "tower_heads")  # rows of patches of many pictures


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Who may look at whom, described and not yet built: kernels read the parts, `array` makes the [T, S] table.

    Attributes:
      query_segment_ids: int32 [B, T]; a query sees only keys with its own segment id. None: no segments.
      key_segment_ids: int32 [B, S].
      slots: int32 [B or 1, T], the slot of each query on the key axis. Slots are places in the row (or in the KV
        cache), not positions: with M-RoPE positions repeat, slots never do.
      window: int32 []: a query sees only the last so many slots, its own included; 0 or None for no limit.
      table: bool [B or 1, 1, T, S], one more limit.
      always: bool [B or 1, 1, T, S], what is seen besides, whatever the limits.
      causal: a query sees keys at slots up to and including its own.
      whole: the slots are 0 .. T-1 in order, and the keys are those of the same row: what kernels can use.
      windows: the values that `window` may have.
    """

    query_segment_ids: jax.Array | None = None
    key_segment_ids: jax.Array | None = None
    slots: jax.Array | None = None
    window: jax.Array | None = None
    table: jax.Array | None = None
    always: jax.Array | None = None
    causal: bool = field(default=True, metadata={"static": True})
    whole: bool = field(default=False, metadata={"static": True})
    windows: tuple[int, ...] = field(default=(0,), metadata={"static": True})

    @property
    def plain(self) -> bool:
        """Made of segments, order and windows alone."""
        return self.whole and self.table is None and self.always is None

    @property
    def ordered(self) -> bool:
        """A query sees nothing behind itself, in the row that queries and keys share."""
        return self.causal and self.whole and self.always is None

    def array(self, num_keys: int) -> jax.Array | None:
        """bool [B, 1, T, num_keys]; None when everybody sees everything."""
        slots = self.slots if self.causal else None
        mask = attention_mask(self.query_segment_ids, self.key_segment_ids, slots, num_keys)
        if self.table is not None:
            mask = self.table if mask is None else mask & self.table
        if self.window is not None:
            mask = window_mask(mask, self.slots, self.window)
        return mask if self.always is None else mask | self.always


def row_mask(segment_ids: jax.Array, causal: bool = True) -> Mask:
    """Attention within the segments of packed rows, int32 [B, T]."""
    return Mask(segment_ids, segment_ids, jnp.arange(segment_ids.shape[1])[None], causal=causal, whole=True)


def as_mask(mask: Mask | jax.Array, slots: jax.Array) -> Mask:
    """A mask given as a table, such as that of `attention_mask`, with the slots of its queries."""
    return mask if isinstance(mask, Mask) else Mask(table=mask, slots=slots, causal=False)


def narrowed(
    mask: Mask, window: jax.Array | None, windows: tuple[int, ...], always: jax.Array | None
) -> Mask:
    """The mask of one layer of many: with its window, one of `windows`, and with what is seen whatever it is."""
    if window is not None:
        mask = dataclasses.replace(mask, window=window, windows=tuple(sorted(set(windows))))
    return mask if always is None else dataclasses.replace(mask, always=always)


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
    mask: Mask | jax.Array | None = None,
    scale: float | None = None,
    cap: float = 0.0,
    bias: jax.Array | None = None,
    execution: Execution = Execution(),
    axes: Axes = DECODER,
) -> jax.Array:
    """Scaled dot-product attention with grouped key/value heads (Vaswani et al. 2017; Ainslie et al. 2023).

    Softmax runs in float32. A query that may see nothing gets a finite, meaningless row: such rows are padding.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H] with K dividing N; head n reads key/value head n // (N // K).
      mask: who may look at whom; also bool [B or 1, 1, T, S], from `attention_mask`.
      scale: factor on query x key; None for H ** -0.5.
      cap: bound of the logits, cap * tanh(logits / cap) (Gemma-2); 0 for none.
      bias: [B or 1, N, T, S], added to the logits behind the cap.
      execution: says which kernel. All give the same numbers; XLA runs where a kernel cannot.
      axes: logical names of B, T, N and K.

    Returns:
      [B, T, N, H] in the dtype of `query`.
    """
    rows, queries, heads, kv_heads = axes
    if execution.context == "heads":
        execution = execution.with_heads_apart(axes, query.shape, key.shape)
    query = execution.constrain(query, rows, queries, heads, None)
    if execution.context == "ring" and bias is None and isinstance(mask, Mask):
        if ring.fits(query, key, mask, execution, axes):
            return ring.attention(query, key, value, mask, scale, cap, execution, axes)
    # every query may need every key: here they are gathered over the axis that splits the queries
    key = execution.constrain(key, rows, None, kv_heads, None)
    value = execution.constrain(value, rows, None, kv_heads, None)
    kernel = choose_kernel(query, key, mask, cap, bias, execution)
    if kernel == "splash":
        return splash.attention(query, key, value, mask, scale, cap, execution, axes)
    one_piece = execution.mesh is None or not execution.spec(query.shape, rows, queries, heads, None)[1]
    causal = isinstance(mask, Mask) and mask.ordered and one_piece
    if isinstance(mask, Mask):
        mask = mask.array(key.shape[1])
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, bias, mask, scale=scale, implementation=kernel)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return blocks.attention(query, key, value, mask, scale, cap, bias, causal)


def choose_kernel(
    query: jax.Array,
    key: jax.Array,
    mask: Mask | jax.Array | None,
    cap: float,
    bias: jax.Array | None,
    execution: Execution,
) -> str:
    """What `attention` runs for these arrays: splash, cudnn or xla.

    Raises:
        ValueError: a kernel that is asked for by name cannot be used.
    """
    plain = bias is None and (mask is None or (isinstance(mask, Mask) and mask.plain))
    fits = plain and splash.fits(query.shape, key.shape)
    # cuDNN's flash attention takes these, and a mask as a table
    halves = (
        query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= 128 and query.shape[-1] % 8 == 0
    )
    cudnn = halves and not cap
    if execution.attention == "auto":
        if execution.platform == "tpu" and fits and query.shape[1] >= splash.SHORTEST:
            return "splash"
        return "cudnn" if execution.platform == "gpu" and cudnn else "xla"
    if not {"splash": fits, "cudnn": cudnn, "xla": True}[execution.attention]:
        raise ValueError(
            f"{execution.attention} attention cannot be used for queries {query.dtype}{list(query.shape)} and keys "
            f"{list(key.shape)} with {'no' if plain else 'a'} table or bias and cap {cap}"
        )
    return execution.attention


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    mask: Mask | jax.Array | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> jax.Array:
    """The probabilities that `attention` uses: float32 [B, N, T, S]."""
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5 if scale is None else scale
    if cap:
        logits = cap * jnp.tanh(logits / cap)
    if isinstance(mask, Mask):
        mask = mask.array(key.shape[1])
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)
