"""Splash attention: the Pallas kernel of TPUs, with segments, windows and soft-cap, on any mesh.

Pallas is imported where it is used: it would make every start a second slower.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec

from mm_jax.models.execution import ATTENTION, Execution

if TYPE_CHECKING:
    from mm_jax.models.attention import Axes, Mask

LANES = 128  # sequence lengths and blocks are multiples of it
LARGEST = 512  # rows of a block
SHORTEST = 512  # below, the [T, S] table is small and XLA is as fast


def fits(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
    """Whether the kernel takes arrays of these shapes, [B, T, N, H] and [B, S, K, H]."""
    return query[1] % LANES == 0 and key[1] % LANES == 0


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
    windows = (0,) if mask is None or mask.window is None else mask.windows
    causal = mask is not None and mask.causal
    query = query * jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, query.dtype)
    run = [functools.partial(_sharded, causal, window, cap, execution, axes) for window in windows]
    segments = None if mask is None else (mask.query_segment_ids, mask.key_segment_ids)
    if segments is not None and segments[0] is None:
        segments = None
    if len(windows) == 1:
        return run[0](query, key, value, segments)
    # the layers of a scan differ in their windows, and a kernel is compiled for one
    which = jnp.argmax(jnp.asarray(windows) == mask.window)
    return jax.lax.switch(which, run, query, key, value, segments)


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
        return _run(_kernel(query.shape, key.shape, causal, window, cap, 1, 1, execution.platform != "tpu"),
                    query, key, value, segments)  # fmt: skip
    queries = execution.spec(query.shape, *axes[:3], None)
    keys = execution.spec(key.shape, axes[0], None, axes[3], None)
    if queries[2] != keys[2]:  # fewer key heads than devices: each device keeps all heads
        queries, keys = (PartitionSpec(*spec[:2], None, None) for spec in (queries, keys))
    rows, length, heads = queries[0], queries[1], queries[2]
    parts = [int(np.prod([mesh.shape[axis] for axis in axes or ()])) for axes in (heads, length)]
    if query.shape[1] // parts[1] % LANES:
        queries, length, parts[1] = PartitionSpec(rows, None, heads, None), None, 1
    kernel = _kernel(query.shape, key.shape, causal, window, cap, *parts, execution.platform != "tpu")
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(heads, length)))
    segment_specs = None if segments is None else (PartitionSpec(rows, length), PartitionSpec(rows, None))
    return jax.shard_map(
        _run,
        mesh=mesh,
        in_specs=(kernel_spec, queries, keys, keys, segment_specs),
        out_specs=queries,
        check_vma=False,
    )(kernel, query, key, value, segments)


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


def _kernel(
    query: tuple[int, ...],
    key: tuple[int, ...],
    causal: bool,
    window: int,
    cap: float,
    head_shards: int,
    query_shards: int,
    interpret: bool,
) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (query[1], key[1])
    if window:
        one = masks.LocalMask(shape, (window - 1, 0 if causal else None), 0, shard_count=query_shards)
    elif causal:
        one = masks.CausalMask(shape, shard_count=query_shards)
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
        attn_logits_soft_cap=cap or None, residual_checkpoint_name=ATTENTION, interpret=interpret,
    )  # fmt: skip


def _block(length: int) -> int:
    """The largest block that divides a length."""
    return next(size for size in range(min(LARGEST, length), 0, -LANES) if length % size == 0)
