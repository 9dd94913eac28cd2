"""Ring attention: rows whose tokens lie in parts on several devices (Liu et al. 2023, arXiv 2310.01889).

Each device keeps its queries. Keys and values go round, from each device to the next, and the results of all parts are
put together by their log-sums: no device ever holds the keys of a whole row. Causal attention without a window would
leave the devices with the first tokens idle, so there each takes a part from both ends of the row (zig-zag). With a
window the round ends where the window does. Parts that have no segment in common are not multiplied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mm_jax.models import splash
from mm_jax.models.execution import ATTENTION, Execution, axes_of

if TYPE_CHECKING:
    from mm_jax.models.attention import Axes, Mask

MASKED = -0.7 * float(np.finfo(np.float32).max)  # as in splash attention: differences of it stay finite


@dataclass(frozen=True)
class Limits:
    """What slots allow within one pair of parts, whose queries stand `distance` slots behind their keys.

    causal: a query sees keys up to its own slot. window: and no more than so many back, its own included; 0: all.
    """

    causal: bool = False
    window: int = 0
    distance: int = 0

    @property
    def all(self) -> bool:
        return not (self.causal or self.window)


@dataclass(frozen=True)
class Ring:
    """One round.

    Attributes:
      names: mesh axes that split the rows; size: devices along them.
      first: limits of a device's part with itself.
      whole: the next so many parts are seen wholly; limits of those behind, which windows end in, are `rest`.
      zigzag: each part has a half from either end of the row.
      wraps: parts of later tokens are seen as well.
      cap: of the logits. kernel: splash attention; interpret: it.
    """

    names: tuple[str, ...]
    size: int
    first: Limits
    whole: int
    rest: tuple[Limits, ...]
    zigzag: bool
    wraps: bool
    cap: float
    kernel: bool
    interpret: bool


def fits(query: jax.Array, key: jax.Array, mask: Mask, execution: Execution, axes: Axes) -> bool:
    """Whether the rows lie in parts, and the mask is made of segments, order and windows alone."""
    plain = mask.plain and query.shape[1] == key.shape[1] and (mask.causal or mask.window is None)
    return plain and bool(parts(query, execution, axes))


def parts(query: jax.Array, execution: Execution, axes: Axes) -> tuple[str, ...]:
    """The mesh axes that split the queries [B, T, N, H] along T."""
    if execution.mesh is None or execution.mesh.size == 1:
        return ()
    return axes_of(execution.spec(query.shape, *axes[:3], None)[1])


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    scale: float | None,
    cap: float,
    execution: Execution,
    axes: Axes,
) -> jax.Array:
    """As `mm_jax.models.attention.attention`, where `fits`."""
    query = query * jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, query.dtype)
    ids = mask.query_segment_ids
    if ids is None:
        ids = jnp.zeros(query.shape[:2], jnp.int32)

    def run(window: int, *arrays: jax.Array) -> jax.Array:
        return _sharded(mask.causal, window, cap, execution, axes, *arrays)

    return splash.by_window(mask, run, query, key, value, ids)


def _sharded(
    causal: bool,
    window: int,
    cap: float,
    execution: Execution,
    axes: Axes,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ids: jax.Array,
) -> jax.Array:
    mesh = execution.mesh
    queries, keys = splash.specs(query.shape, key.shape, execution, axes, axes[1])
    names = parts(query, execution, axes)
    size = math.prod(mesh.shape[name] for name in names)
    length = query.shape[1] // size
    zigzag = causal and not window and length % 2 == 0
    block = length // 2 if zigzag else length
    kernel = splash.wanted(execution) and block % splash.LANES == 0
    whole, rest = size - 1, ()
    if window:
        reached = min(size - 1, (window + length - 2) // length)  # parts back that some query sees a key of
        whole = min(reached, max(window // length - 1, 0))  # and that all queries see all keys of
        rest = tuple(Limits(False, window, i * length) for i in range(whole + 1, reached + 1))
    ring = Ring(
        names,
        size,
        Limits(causal, window),
        whole,
        rest,
        zigzag,
        not causal,
        cap,
        kernel,
        execution.platform != "tpu",
    )
    run = jax.shard_map(
        functools.partial(_run, ring),
        mesh=mesh,
        in_specs=(queries, keys, keys, PartitionSpec(*queries[:2])),
        out_specs=queries,
        check_vma=False,
    )
    return run(query, key, value, ids)


def _run(ring: Ring, query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> jax.Array:
    """On each device: [b, t, n, h] of its part."""
    dtype = query.dtype
    query, key, value = (_spread(ring, rearrange(x, "b t n h -> t b n h")) for x in (query, key, value))
    ids = _spread(ring, ids.T)
    query, key, value = (rearrange(x, "p t b n h -> p b n t h") for x in (query, key, value))
    out = _attend(ring, query, key, value, rearrange(ids, "p t b -> p b t"))
    out = _collect(ring, rearrange(out, "p b n t h -> p t b n h"))
    return rearrange(out, "t b n h -> b t n h").astype(dtype)


def _spread(ring: Ring, x: jax.Array) -> jax.Array:
    """[t, ...] of consecutive slots -> [halves, t / halves, ...]; zig-zag device d gets the halves d and 2 size - 1 - d
    of the 2 size halves of a row."""
    if not ring.zigzag:
        return x[None]
    ways = _ways(ring)
    even, odd = (
        jax.lax.ppermute(half, ring.names, way) for half, way in zip(jnp.split(x, 2), ways, strict=True)
    )
    # halves keep their parity on the way, and d and 2 size - 1 - d differ in theirs
    first_is_even = jax.lax.axis_index(ring.names) % 2 == 0
    return jnp.where(first_is_even, jnp.stack([even, odd]), jnp.stack([odd, even]))


def _collect(ring: Ring, x: jax.Array) -> jax.Array:
    """What `_spread` has spread, as before."""
    if not ring.zigzag:
        return x[0]
    first_is_even = jax.lax.axis_index(ring.names) % 2 == 0
    halves = jnp.where(first_is_even, x, x[::-1])
    back = [[(there, here) for here, there in way] for way in _ways(ring)]
    return jnp.concatenate(
        [jax.lax.ppermute(h, ring.names, way) for h, way in zip(halves, back, strict=True)]
    )


def _ways(ring: Ring) -> list[list[tuple[int, int]]]:
    """(from, to) of the first, even halves of all devices, and of the second, odd ones."""
    return [
        [
            (d, half if (half := 2 * d + parity) < ring.size else 2 * ring.size - 1 - half)
            for d in range(ring.size)
        ]
        for parity in (0, 1)
    ]


# (half of the queries, half of the keys, limits, whether the queries stand behind the keys)
Piece = tuple[Any, Any, Limits, Any]


def _first(ring: Ring) -> list[Piece]:
    """What a device does with its own keys."""
    if not ring.zigzag:
        return [(0, 0, ring.first, True)]
    return [(0, 0, ring.first, True), (1, 1, ring.first, True), (1, 0, Limits(), True)]


def _later(ring: Ring, step: Any, limits: Limits) -> list[Piece]:
    """And with those of the device `step` places before it in the ring."""
    before = jax.lax.axis_index(ring.names) >= step  # else that one has later tokens
    if not ring.zigzag:
        return [(0, 0, limits, ring.wraps | before)]
    half = jnp.where(before, 0, 1)
    return [(1, 0, limits, True), (half, half, limits, True)]


def _round(ring: Ring, step: Callable[..., Any], state: Any, around: Any, growing: Any) -> tuple[Any, Any]:
    """Runs step(pieces, state, around, growing) -> (state, growing) for all parts that are seen.

    `around` goes from device to device; so does `growing`, to which each adds something, and which comes home.
    """
    following = _moved(ring, around, 1)  # on its way while this device computes
    state, growing = step(_first(ring), state, around, growing)

    def one(i: Any, carry: Any, limits: Limits = Limits()) -> Any:
        state, around, growing = carry
        following = _moved(ring, around, 1)
        state, growing = step(_later(ring, i, limits), state, around, _moved(ring, growing, 1))
        return state, following, growing

    carry = state, following, growing
    if ring.whole:
        carry = jax.lax.fori_loop(1, ring.whole + 1, one, carry)
    for i, limits in enumerate(ring.rest, ring.whole + 1):
        carry = one(i, carry, limits)
    return carry[0], _moved(ring, carry[2], -ring.whole - len(ring.rest))


def _moved(ring: Ring, tree: Any, by: int) -> Any:
    """Arrays of the device `by` places before in the ring."""
    if by % ring.size == 0:
        return tree
    way = [(d, (d + by) % ring.size) for d in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.names, way), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> jax.Array:
    """[p, b, n, t, h], keys and values [p, b, k, t, h], segment ids int32 [p, b, t] of p halves -> [p, b, n, t, h]."""
    return _forward(ring, query, key, value, ids)[0]


def _forward(
    ring: Ring, query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """And float32 [p, b, n, t], the logarithms of the sums that the softmax divides by."""

    def step(pieces: list[Piece], state: Any, around: Any, growing: None) -> Any:
        key, value, key_ids = around
        for q, k, limits, here in pieces:
            given = (query[q], key[k], value[k], ids[q], key_ids[k])
            out, total = jax.lax.cond(
                here & _meet(ids[q], key_ids[k]),
                functools.partial(_block, ring, limits),
                functools.partial(_no_block, ring, limits),
                *given,
            )
            both = jnp.logaddexp(state[1][q], total)
            old, new = (jnp.exp(part - both)[..., None] for part in (state[1][q], total))
            state = (
                state[0].at[q].set(state[0][q] * old + out.astype(jnp.float32) * new),
                state[1].at[q].set(both),
            )
        return state, growing

    empty = jnp.zeros(query.shape, jnp.float32), jnp.full(query.shape[:-1], MASKED, jnp.float32)
    (out, total), _ = _round(ring, step, empty, (key, value, ids), None)
    return checkpoint_name(out.astype(query.dtype), ATTENTION), checkpoint_name(total, ATTENTION)


def _save(ring: Ring, *given: jax.Array) -> tuple[jax.Array, Any]:
    out, total = _forward(ring, *given)
    return out, (*given, out, total)


def _backward(ring: Ring, saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    query, key, value, ids, out, total = saved

    def step(pieces: list[Piece], to_query: jax.Array, around: Any, growing: Any) -> Any:
        (key, value, key_ids), (to_key, to_value) = around, growing
        for q, k, limits, here in pieces:
            given = (query[q], key[k], value[k], ids[q], key_ids[k], out[q], total[q], gradient[q])
            added = jax.lax.cond(
                here & _meet(ids[q], key_ids[k]),
                functools.partial(_block_gradients, ring, limits),
                lambda *given: tuple(jnp.zeros_like(x) for x in given[:3]),
                *given,
            )
            to_query = to_query.at[q].add(added[0].astype(jnp.float32))
            to_key = to_key.at[k].add(added[1].astype(jnp.float32))
            to_value = to_value.at[k].add(added[2].astype(jnp.float32))
        return to_query, (to_key, to_value)

    empty, *growing = (jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
    to_query, (to_key, to_value) = _round(ring, step, empty, (key, value, ids), tuple(growing))
    return to_query.astype(query.dtype), to_key.astype(key.dtype), to_value.astype(value.dtype), None


_attend.defvjp(_save, _backward)


def _meet(ids: jax.Array, key_ids: jax.Array) -> jax.Array:
    """Whether queries and keys can have a segment in common; packed rows count theirs up."""
    return jnp.any((ids.min(1) <= key_ids.max(1)) & (key_ids.min(1) <= ids.max(1)))


def _block(
    ring: Ring,
    limits: Limits,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ids: jax.Array,
    key_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """[b, n, t, h] over keys and values [b, k, s, h] alone -> [b, n, t, h] and the log-sums float32 [b, n, t]."""
    if ring.kernel:
        return splash.block(_kernel(ring, limits, query, key), query, key, value, ids, key_ids)
    logits, _ = _logits(ring, limits, query, key, ids, key_ids)
    total = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - total[..., None])
    out = jnp.einsum("bkgts,bksh->bkgth", weights, value, preferred_element_type=jnp.float32)
    return rearrange(out, "b k g t h -> b (k g) t h"), rearrange(total, "b k g t -> b (k g) t")


def _no_block(ring: Ring, limits: Limits, *given: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `_block`, of keys that nobody sees."""
    out, total = jax.eval_shape(functools.partial(_block, ring, limits), *given)
    return jnp.zeros_like(out), jnp.full_like(total, MASKED)


def _block_gradients(
    ring: Ring,
    limits: Limits,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ids: jax.Array,
    key_ids: jax.Array,
    out: jax.Array,
    total: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of query, key and value; `out` and `total` are those over all keys."""
    if ring.kernel:
        kernel = _kernel(ring, limits, query, key)
        return splash.block_gradients(kernel, query, key, value, ids, key_ids, out, total, gradient)
    logits, slope = _logits(ring, limits, query, key, ids, key_ids)
    grouped = functools.partial(rearrange, pattern="b (k g) ... -> b k g ...", k=key.shape[1])
    weights = jnp.exp(logits - grouped(total)[..., None])
    gradient, lost = grouped(gradient), grouped((out.astype(jnp.float32) * gradient).sum(-1))
    exact = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    to_value = exact("bkgts,bkgth->bksh", weights, gradient)
    to_logits = weights * (exact("bkgth,bksh->bkgts", gradient, value) - lost[..., None]) * slope
    to_query = exact("bkgts,bksh->bkgth", to_logits, key)
    to_key = exact("bkgts,bkgth->bksh", to_logits, grouped(query))
    to_query = rearrange(to_query, "b k g t h -> b (k g) t h")
    return to_query.astype(query.dtype), to_key.astype(key.dtype), to_value.astype(value.dtype)


def _logits(
    ring: Ring, limits: Limits, query: jax.Array, key: jax.Array, ids: jax.Array, key_ids: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
    """float32 [b, k, g, t, s], and their derivative by what they were before the cap."""
    query = rearrange(query, "b (k g) t h -> b k g t h", k=key.shape[1])
    logits, slope = jnp.einsum("bkgth,bksh->bkgts", query, key, preferred_element_type=jnp.float32), 1.0
    if ring.cap:
        bent = jnp.tanh(logits / ring.cap)
        logits, slope = ring.cap * bent, 1 - bent**2
    seen = ids[:, :, None] == key_ids[:, None]
    back = limits.distance + jnp.arange(logits.shape[-2])[:, None] - jnp.arange(logits.shape[-1])
    if limits.causal:
        seen &= back >= 0
    if limits.window:
        seen &= back < limits.window
    return jnp.where(seen[:, None, None], logits, MASKED), slope


def _kernel(ring: Ring, limits: Limits, query: jax.Array, key: jax.Array) -> Any:
    shapes = [(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (query, key)]
    return splash.kernel(
        *shapes,
        limits.causal,
        limits.window,
        ring.cap,
        interpret=ring.interpret,
        distance=limits.distance,
        sums=True,
    )
