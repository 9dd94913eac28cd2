"""What runs on the device: one program each to encode media, to read prompts, and to decode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec

from mm_jax.inference.sampling import ALTERNATIVES, Choice, Controls, Tables, sample
from mm_jax.models import MultimodalLM, init_cache

_AXES = {"key": 2, "value": 2, "segment_ids": 1}  # of the cache's slots
_CONTEXT = {
    "context_key": 2,
    "context_value": 2,
    "seen": 1,
}  # of the features that layers of their own read, or shares
_MEMORY = {"tail": 1, "state": 1}  # of rows, where layers remember the text as a whole
_ROWS = {name: axis - 1 for name, axis in (_AXES | _CONTEXT).items()} | _MEMORY


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Where the answers of B rows stand.

    Attributes:
      cache: from `init_cache`, B rows.
      tokens: int32 [B], chosen but not yet read by the decoder.
      places: int32 [B], where `tokens` go in the cache.
      positions: int32 [B], their positions.
      left: int32 [B], tokens that may still be chosen.
      ends: bool [B], the row ends at a stop token.
      tables: what sampling remembers.
    """

    cache: dict[str, jax.Array]
    tokens: jax.Array
    places: jax.Array
    positions: jax.Array
    left: jax.Array
    ends: jax.Array
    tables: Tables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Said:
    """Tokens that a program chose: every field [rows, steps, ...], of which `count` int32 [rows] are filled."""

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array
    count: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reading:
    """Pieces of prompts that are read together (R pieces of S tokens, right-padded).

    Attributes:
      tokens, segment_ids, media_index: int32 [R, S]; media_index counts in the pool of features.
      positions: int32 [R, S], or [R, S, 3] for M-RoPE.
      rows: int32 [R], the row that a piece belongs to; a number past the last row for an unused place.
      starts: int32 [R], the cache slot of a piece's first token.
      counts: int32 [R], real tokens.
      following: int32 [R], the position behind the whole prompt.
      final: bool [R], the piece is the end of its prompt: the first token of the answer is chosen.
      left: int32 [R], tokens that the answer may have; ends: bool [R], see `State`.
      media_taps, tap_weights: int32, float32 [R, S, T], where features are mixed, see `splice`.
      blocks: int32 [R, S], where some tokens see each other whatever their order.
      slot_firsts: int32 [R, N], where the features of each image slot begin in the pool, and seen: int8
        [R, S, N * shares]; for decoders that read features in layers of their own.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    media_index: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    following: np.ndarray
    final: np.ndarray
    left: np.ndarray
    ends: np.ndarray
    media_taps: np.ndarray | None = None
    tap_weights: np.ndarray | None = None
    blocks: np.ndarray | None = None
    slot_firsts: np.ndarray | None = None
    seen: np.ndarray | None = None

    @classmethod
    def empty(
        cls,
        pieces: int,
        length: int,
        rows: int,
        axes: int = 0,
        taps: int = 0,
        two_way: bool = False,
        images: int = 0,
        shares: int = 0,
    ) -> Reading:
        """`pieces` unused places; axes: of positions, 0 for plain ones; taps: 0 where features are not mixed; images:
        slots of a row for pictures of so many shares that are read in layers of their own."""

        def zeros(*shape: int) -> np.ndarray:
            return np.zeros(shape, np.int32)

        text = pieces, length
        return cls(
            zeros(*text), zeros(*text), zeros(*text, *[axes] * bool(axes)), zeros(*text) - 1, zeros(pieces) + rows,
            zeros(pieces), zeros(pieces), zeros(pieces), zeros(pieces) > 0, zeros(pieces), zeros(pieces) > 0,
            zeros(*text, taps) if taps else None, zeros(*text, taps).astype(np.float32) if taps else None,
            zeros(*text) if two_way else None, zeros(pieces, images) if images else None,
            zeros(*text, images * shares).astype(np.int8) if images else None,
        )  # fmt: skip


class Programs:
    """The compiled programs of a model, shared by all its engines.

    Each is compiled once for every combination of the sizes that its arguments have; sampling settings, answer lengths
    and stop behaviour are arguments, so changing them compiles nothing.

    Attributes:
      taps: features that a media token is mixed of, 0 where it takes one.
      two_way: prompts have blocks of tokens that see each other.
      shares: of a picture's features, for decoders that read them in layers of their own; else 0.
      traces: how often each program has been traced, by name: it stands still once everything is compiled.
    """

    def __init__(
        self,
        model: MultimodalLM,
        params: Any,
        stop_ids: Sequence[int] = (),
        pad_id: int = 0,
        taps: int = 0,
        two_way: bool = False,
        shares: int = 0,
    ):
        self.model, self.params, self.taps, self.two_way = model, params, taps, two_way
        self.shares = shares
        self.stop_ids, self.pad_id = tuple(int(i) for i in stop_ids), pad_id
        self.traces: Counter[str] = Counter()
        programs = {
            # (function, static names, place of the state or the pool, which is given up)
            "start": (_start, ("rows", "length", "images"), ()),
            "grow": (_grow, ("length", "images"), ()),
            "copy": (_copy, (), (0,)),
            "equip": (_equip, (), (0,)),
            "pool": (_pool, ("capacity",), ()),
            "encode": (_encode, (), (1,)),
            "prefill": (_prefill, ("length",), (1,)),
            "decode": (_decode, ("length", "steps"), (1,)),
        }
        for name, (function, static, donated) in programs.items():
            program = jax.jit(
                partial(_traced, self, name, function), static_argnames=static, donate_argnums=donated
            )
            setattr(self, name, program)

    @property
    def position_axes(self) -> int:
        """3 for M-RoPE, 0 for plain positions."""
        return 3 if self.model.config.decoder.rope_sections else 0

    def bound(self, tree: Any) -> Any:
        """The same arrays, bound to the devices of the parameters: a program is compiled once more for arrays that are
        not, such as those that were made of nothing, and those lie on the first device, wherever the parameters are."""
        home = next((x.sharding for x in jax.tree.leaves(self.params) if isinstance(x, jax.Array)), None)

        def place(x: jax.Array) -> jax.Array:
            if home is None or x.sharding.device_set == home.device_set:
                return jax.device_put(x, x.sharding)
            whole = NamedSharding(home.mesh, PartitionSpec()) if isinstance(home, NamedSharding) else home
            return jax.device_put(x, whole)

        return jax.tree.map(place, tree)

    @property
    def rewinds(self) -> bool:
        """Whether a row of the cache can go on from any token that it has read, and not from the newest alone."""
        return not self.model.config.decoder.delta_layers

    @property
    def vocab_size(self) -> int:
        return self.model.config.decoder.vocab_size


def _traced(self: Programs, name: str, function: Any, *arguments: Any, **named: Any) -> Any:
    self.traces[name] += 1
    return function(self, *arguments, **named)


def _start(self: Programs, *, rows: int, length: int, images: int = 0) -> State:
    config = self.model.config
    zeros = jnp.zeros(rows, jnp.int32)
    sizes = images * config.image_tokens, images * self.shares
    cache = init_cache(config.decoder, rows, length, jnp.dtype(config.dtype), *sizes)
    for name in cache.keys() & {"key", "value", "context_key", "context_value"}:
        cache[name] = self.model.execution.constrain(cache[name], None, "batch", None, "kv_heads", None)
    return State(cache, zeros, zeros, zeros, zeros, zeros > 0, Tables.empty(rows, self.vocab_size))


def _grow(self: Programs, state: State, *, length: int, images: int = 0) -> State:
    """The state with empty slots up to `length`, and for so many pictures of a row."""
    features = images * self.model.config.image_tokens
    sizes = dict.fromkeys(_AXES, length) | dict.fromkeys(_CONTEXT, features) | {"seen": images * self.shares}

    def longer(name: str, array: jax.Array) -> jax.Array:
        axis = (_AXES | _CONTEXT).get(name)
        return jnp.pad(array, [(0, sizes[name] - n if k == axis else 0) for k, n in enumerate(array.shape)])

    return replace(state, cache={name: longer(name, array) for name, array in state.cache.items()})


def _copy(self: Programs, state: State, source: jax.Array, target: jax.Array, length: jax.Array) -> State:
    """The state with the first `length` tokens of row `source` in row `target` as well."""

    def move(name: str, array: jax.Array) -> jax.Array:
        axis = _ROWS[name]
        row = jax.lax.dynamic_slice_in_dim(array, source, 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(array, row, target, axis)

    cache = {name: move(name, array) for name, array in state.cache.items()}
    # a row that waits writes padding behind its tokens
    return replace(state, cache=cache, places=state.places.at[target].set(length))


def _equip(self: Programs, state: State, row: jax.Array, prompted: jax.Array, bias: jax.Array) -> State:
    """The state with one row's tables of the prompt's tokens and of the bias."""
    tables = state.tables
    tables = replace(
        tables, prompted=tables.prompted.at[row].set(prompted), bias=tables.bias.at[row].set(bias)
    )
    return replace(state, tables=tables)


def _pool(self: Programs, *, capacity: int) -> jax.Array:
    """Room for media features: [capacity, D]."""
    config = self.model.config
    return jnp.zeros((capacity, config.feature_dim), jnp.dtype(config.dtype))


def _encode(
    self: Programs, params: Any, pool: jax.Array, media: dict[str, jax.Array], first: jax.Array
) -> jax.Array:
    """The pool with the features of media of one kind, one a row of the batch, from `first` on."""
    rows = len(next(iter(media.values())))
    batch = {**media, "tokens": jnp.zeros((rows, 1), jnp.int32)}
    features = self.model.apply({"params": params}, batch, method="encode")
    features = rearrange(features, "n f d -> (n f) d")
    return jax.lax.dynamic_update_slice_in_dim(pool, features.astype(pool.dtype), first, 0)


def _part(cache: dict[str, jax.Array], length: int) -> dict[str, jax.Array]:
    """The first `length` slots."""
    return {
        name: jax.lax.slice_in_dim(x, 0, length, axis=_AXES[name]) if name in _AXES else x
        for name, x in cache.items()
    }


def _prefill(
    self: Programs,
    params: Any,
    state: State,
    pool: jax.Array,
    reading: Reading,
    controls: Controls,
    allowed: jax.Array,
    *,
    length: int,
) -> tuple[State, Said, jax.Array]:
    """Read pieces of prompts; attention reaches over the first `length` slots. controls, allowed: of the R pieces.

    Besides, float32 [R, D]: what the decoder has made of the last token of each piece, behind its final norm.
    """
    r = reading
    rows = r.rows
    part = {
        name: jnp.take(array, rows, axis=_ROWS[name], mode="clip")
        for name, array in _part(state.cache, length).items()
    }
    batch = {"tokens": r.tokens, "segment_ids": r.segment_ids, "positions": r.positions}
    if r.blocks is not None:
        batch["blocks"] = r.blocks
    if pool.shape[0]:
        batch |= {"features": pool, "media_index": r.media_index}
        if r.media_taps is not None:
            batch |= {"media_taps": r.media_taps, "tap_weights": r.tap_weights}
        if r.seen is not None:
            batch |= {"slot_firsts": r.slot_firsts, "seen": r.seen}
    last = jnp.maximum(r.counts - 1, 0)
    hidden, part = self.model.apply({"params": params}, batch, part, r.starts, last, method="advance")
    logits = self.model.apply({"params": params}, hidden, method="logits")

    def places(name: str) -> tuple:
        slots = (slice(0, length),) if name in _AXES else ()
        return (slice(None),) * _ROWS[name] + (rows, *slots)

    cache = {name: state.cache[name].at[places(name)].set(array, mode="drop") for name, array in part.items()}
    # nothing has been said yet
    fresh = Tables(
        jnp.zeros((len(rows), self.vocab_size), jnp.int32),
        jnp.take(state.tables.prompted, rows, axis=0, mode="clip"),
        jnp.take(state.tables.bias, rows, axis=0, mode="clip"),
    )
    choice = sample(logits[:, 0], controls, fresh, allowed, r.following)
    counts = fresh.counts.at[jnp.arange(len(rows)), choice.tokens].set(1)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows].set(new, mode="drop")

    goes_on = r.final & ~_stops(self, choice.tokens, r.ends)
    state = replace(
        state,
        cache=cache,
        tokens=put(state.tokens, choice.tokens),
        places=put(state.places, r.starts + r.counts),
        positions=put(state.positions, r.following),
        left=put(state.left, jnp.where(goes_on, r.left - 1, 0)),
        ends=put(state.ends, r.ends),
        tables=replace(state.tables, counts=put(state.tables.counts, counts)),
    )
    outputs = jax.tree.map(lambda x: x[:, None], choice)
    said = Said(
        outputs.tokens, outputs.logprobs, outputs.top_tokens, outputs.top_logprobs, r.final.astype(jnp.int32)
    )
    return state, said, hidden[:, 0].astype(jnp.float32)


def _stops(self: Programs, tokens: jax.Array, ends: jax.Array) -> jax.Array:
    return jnp.isin(tokens, jnp.asarray(self.stop_ids, jnp.int32)) & ends


def _decode(
    self: Programs,
    params: Any,
    state: State,
    controls: Controls,
    allowed: jax.Array,
    active: jax.Array,
    *,
    length: int,
    steps: int,
) -> tuple[State, Said]:
    """At most `steps` more tokens of the active rows (bool [B]) that have some left, over the first `length` slots."""
    whole = state.cache
    rows = len(active)
    zeros = jnp.zeros((rows, steps), jnp.int32)
    more = jnp.zeros((rows, steps, min(ALTERNATIVES, self.vocab_size)), jnp.int32)
    said = Said(
        zeros + self.pad_id, zeros.astype(jnp.float32), more, more.astype(jnp.float32), jnp.sum(zeros, axis=1)
    )

    def going(carry: tuple[jax.Array, State, Said]) -> jax.Array:
        step, state, _ = carry
        return (step < steps) & jnp.any(active & (state.left > 0))

    def one(carry: tuple[jax.Array, State, Said]) -> tuple[jax.Array, State, Said]:
        step, s, said = carry
        moving = active & (s.left > 0)
        # a row that has stopped writes padding at the slot after its tokens, again and again
        batch = {
            "tokens": s.tokens[:, None],
            "segment_ids": moving.astype(jnp.int32)[:, None],
            "positions": jnp.where(moving, s.positions, 0)[:, None],
        }
        logits, cache = self.model.apply({"params": params}, batch, s.cache, s.places, method="extend")
        choice = sample(logits[:, 0], controls, s.tables, allowed, s.positions + 1)
        tokens = jnp.where(moving, choice.tokens, self.pad_id)
        moved = moving.astype(jnp.int32)
        counts = s.tables.counts.at[jnp.arange(rows), tokens].add(moved)
        left = jnp.where(_stops(self, tokens, s.ends), 0, s.left - 1)
        s = replace(
            s,
            cache=cache,
            tokens=jnp.where(moving, tokens, s.tokens),
            places=s.places + moved,
            positions=s.positions + moved,
            left=jnp.where(moving, left, s.left),
            tables=replace(s.tables, counts=counts),
        )
        return step + 1, s, _append(said, replace(choice, tokens=tokens), step, moved)

    part = replace(state, cache=_part(whole, length))
    _, part, said = jax.lax.while_loop(going, one, (jnp.int32(0), part, said))
    cache = {
        name: jax.lax.dynamic_update_slice_in_dim(whole[name], array, 0, _AXES[name])
        if name in _AXES
        else array
        for name, array in part.cache.items()
    }
    return replace(part, cache=cache), said


def _append(said: Said, choice: Choice, step: jax.Array, moved: jax.Array) -> Said:
    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new[:, None], step, 1)

    return Said(
        put(said.tokens, choice.tokens),
        put(said.logprobs, choice.logprobs),
        put(said.top_tokens, choice.top_tokens),
        put(said.top_logprobs, choice.top_logprobs),
        said.count + moved,
    )
