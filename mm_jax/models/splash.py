"""Splash attention: the Pallas kernel of TPUs, with segments, windows and soft-cap, on any mesh.

Pallas is imported where it is used: it would make every start a second slower.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec

from mm_jax.models.execution import ATTENTION, Execution, axes_of

if TYPE_CHECKING:
    from mm_jax.models.attention import Axes, Mask

LANES = 128  # sequence lengths and blocks are multiples of it
LARGEST = 512  # rows of a block
SHORTEST = 512  # below, the [T, S] table is small and XLA is as fast


def fits(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
    """Whether the kernel takes arrays of these shapes, [B, T, N, H] and [B, S, K, H]."""
    return query[1] % LANES == 0 and key[1] % LANES == 0


def wanted(execution: Execution) -> bool:
    """Whether the kernel is asked for by name, or this is where it runs."""
    return execution.attention == "splash" or (execution.attention == "auto" and execution.platform == "tpu")


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | None,
    scale: float | None,
    cap: float,
    execution: Execution,
    axes: Axes,
) -> jax.Array:
    """As `mm_jax.models.attention.attention`, for a mask of whole rows. Off TPUs the kernel is interpreted."""
    causal = mask is not None and mask.causal
    query = query * jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, query.dtype)
    segments = None if mask is None else (mask.query_segment_ids, mask.key_segment_ids)
    if segments is not None and segments[0] is None:
        segments = None

    def run(window: int, *arrays: Any) -> jax.Array:
        return _sharded(causal, window, cap, execution, axes, *arrays)

    return by_window(mask, run, query, key, value, segments)


def by_window(mask: Mask | None, run: Callable[..., jax.Array], *arrays: Any) -> jax.Array:
    """`run(window, *arrays)` with the window of the mask, which is a number there; 0 for no limit.

    The layers of a scan differ in their windows, and what runs is compiled for one.
    """
    windows = (0,) if mask is None or mask.window is None else mask.windows
    if len(windows) == 1:
        return run(windows[0], *arrays)
    which = jnp.argmax(jnp.asarray(windows) == mask.window)
    return jax.lax.switch(which, [functools.partial(run, window) for window in windows], *arrays)


def _sharded(
    causal: bool,
    window: int,
    cap: float,
    execution: Execution,
    axes: Axes,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """Every device runs the kernel on its rows, heads and queries."""
    mesh = execution.mesh
    if mesh is None or mesh.size == 1:
        one = kernel(query.shape, key.shape, causal, window, cap, interpret=execution.platform != "tpu")
        return _run(one, query, key, value, segments)
    queries, keys = specs(query.shape, key.shape, execution, axes)
    rows, length, heads = queries[0], queries[1], queries[2]
    parts = [math.prod(mesh.shape[axis] for axis in names) for names in (axes_of(heads), axes_of(length))]
    if query.shape[1] // parts[1] % LANES:
        queries, length, parts[1] = PartitionSpec(rows, None, heads, None), None, 1
    one = kernel(query.shape, key.shape, causal, window, cap, *parts, execution.platform != "tpu")
    kernel_spec = one.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(heads, length)))
    segment_specs = None if segments is None else (PartitionSpec(rows, length), PartitionSpec(rows, None))
    return jax.shard_map(
        _run,
        mesh=mesh,
        in_specs=(kernel_spec, queries, keys, keys, segment_specs),
        out_specs=queries,
        check_vma=False,
    )(one, query, key, value, segments)


def specs(
    query: tuple[int, ...],
    key: tuple[int, ...],
    execution: Execution,
    axes: Axes,
    keys: str | None = None,
) -> tuple[PartitionSpec, PartitionSpec]:
    """How queries and keys of these shapes lie on the mesh; `keys`: logical name of the keys' own axis."""
    queries = execution.spec(query, *axes[:3], None)
    keys = execution.spec(key, axes[0], keys, axes[3], None)
    if queries[2] != keys[2]:  # fewer key heads than devices: each device keeps all heads
        queries, keys = (PartitionSpec(*spec[:2], None, None) for spec in (queries, keys))
    return queries, keys


def _run(
    kernel: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    query, key, value = (rearrange(x, "b t n h -> b n t h") for x in (query, key, value))
    if segments is None:
        out = jax.vmap(kernel)(query, key, value)
    else:
        out = jax.vmap(kernel)(query, key, value, SegmentIds(*segments))
    return rearrange(out, "b n t h -> b t n h").astype(query.dtype)


def kernel(
    query: tuple[int, ...],
    key: tuple[int, ...],
    causal: bool,
    window: int,
    cap: float,
    head_shards: int = 1,
    query_shards: int = 1,
    interpret: bool = False,
    distance: int = 0,
    sums: bool = False,
) -> Any:
    """For [N, T, H] and [K, S, H] out of arrays [B, T, N, H] and [B, S, K, H] of these shapes.

    distance: slots that the queries stand behind the keys. sums: it also gives the logarithms of the sums that the
    softmax divides by, see `block`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (query[1], key[1])
    if window:
        one = masks.LocalMask(shape, (window - 1, 0 if causal else None), distance, shard_count=query_shards)
    elif causal:
        one = masks.CausalMask(shape, distance, shard_count=query_shards)
    else:
        one = masks.FullMask(shape)
    block_q, block_kv = _block(query[1] // query_shards), _block(key[1])
    sizes = kernels.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
        block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    return kernels.make_splash_mha(
        masks.MultiHeadMask([one] * query[2]), block_sizes=sizes, head_shards=head_shards, q_seq_shards=query_shards,
        attn_logits_soft_cap=cap or None, residual_checkpoint_name=None if sums else ATTENTION, interpret=interpret,
        save_residuals=sums,
    )  # fmt: skip


def block(
    kernel: Any, query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array, key_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over some of the keys, by a kernel that gives `sums`.

    Args:
      query: [B, N, T, H]; key, value: [B, K, S, H]; ids, key_ids: int32 [B, T] and [B, S].

    Returns:
      [B, N, T, H] and the logarithms of the softmax's sums, float32 [B, N, T].
    """
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    out, (total,) = jax.vmap(kernel)(query, key, value, SegmentIds(ids, key_ids))
    return out, total


def block_gradients(
    kernel: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ids: jax.Array,
    key_ids: jax.Array,
    out: jax.Array,
    total: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to the gradients of query, key and value; `out` and `total` are those over all keys."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    def one(
        query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array, key_ids: jax.Array, *after: Any
    ) -> Any:
        out, total, gradient = after
        saved = (query, key, value, kernels.SegmentIds(ids, key_ids), None, out, total)
        saved += (kernel.dq_mask_info, kernel.dkv_mask_info)
        # there is no public way to say the sums over all keys
        return kernels._splash_attention_bwd(res=saved, do=gradient, **kernel.kwargs)[3:6]

    return jax.vmap(one)(query, key, value, ids, key_ids, out, total, gradient)


def _block(length: int) -> int:
    """The largest block that divides a length."""
    return next(size for size in range(min(LARGEST, length), 0, -LANES) if length % size == 0)
