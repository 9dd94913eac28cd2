"""The generation loop: one prefill program and one decode program for every shape in a short list."""

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

from mm_jax.data.packing import Layout
from mm_jax.errors import UserError
from mm_jax.inference.batch import left_aligned, length_bucket, pad_batch
from mm_jax.inference.sampling import Controls, Sampling, sample
from mm_jax.models import MultimodalLM, init_cache

Batch = dict[str, np.ndarray]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Where a batch of answers stands; L is the cache length.

    Attributes:
      cache: from `init_cache`.
      tokens: int32 [B], chosen but not yet read by the decoder.
      slots, positions: int32 [B], where `tokens` go in the cache and their positions.
      stopped: bool [B].
      output: int32 [B, L], the new tokens, padding after a stop.
      count: int32 [], columns of `output` that are filled.
    """

    cache: dict[str, jax.Array]
    tokens: jax.Array
    slots: jax.Array
    positions: jax.Array
    stopped: jax.Array
    output: jax.Array
    count: jax.Array


class Generator:
    """Prefill and decode over a KV cache.

    Programs are compiled once for each (rows, prompt length, media slots, cache length), all rounded up to
    listed sizes; sampling settings, answer lengths and stop behaviour are arguments, so changing them
    compiles nothing. Rows are right-padded and each writes at its own slots, so rows of different lengths do
    not see each other's padding.

    Args:
      model: the module.
      params: its parameters.
      layout: padding and media slots.
      stop_ids: the tokens that end an answer.
      max_length: most tokens of prompt and answer together.

    Attributes:
      traces: how often each program has been traced, by name: it stands still once everything is compiled.
    """

    def __init__(
        self,
        model: MultimodalLM,
        params: Any,
        layout: Layout,
        stop_ids: Sequence[int] = (),
        *,
        max_length: int = 1024,
    ):
        self.model, self.params, self.max_length = model, params, max_length
        self.layout = layout
        self.stop_ids = tuple(int(i) for i in stop_ids)
        self.traces: Counter = Counter()
        self._prefill = jax.jit(
            partial(_prefill, self), static_argnames=("length",), donate_argnames=("cache",)
        )
        self._decode = jax.jit(partial(_decode, self), donate_argnames=("state",))
        self._grow = jax.jit(partial(_grow, self), static_argnames=("length",))

    def check_length(self, prompt: int, new: int) -> None:
        """Raises UserError when a prompt and its answer do not fit `max_length`."""
        if new < 1:
            raise UserError(f"max_new_tokens is {new}; at least 1 is needed")
        if prompt + new > self.max_length:
            raise UserError(
                f"the prompt has {prompt} tokens and {new} may follow: over the limit of {self.max_length}; "
                "shorten the question, use fewer pictures or clips, or lower max_new_tokens"
            )

    def prefill(
        self,
        batch: Batch,
        controls: Controls,
        *,
        new_tokens: int,
        cache: dict[str, jax.Array] | None = None,
        starts: np.ndarray | None = None,
        cache_length: int = 0,
        ignore_eos: bool = False,
    ) -> State:
        """Read prompts and choose the first token of each answer.

        Args:
          batch: padded to listed sizes; rows of padding alone answer nothing.
          new_tokens: tokens that the answers may have; room for them is kept in the cache.
          cache, starts: go on from `cache` (which is given up), row b from slot starts[b] int32 [B].
          cache_length: slots of a new cache at least.
        """
        rows, length = batch["tokens"].shape
        if starts is None:
            starts = np.zeros(rows, np.int32)
        used = starts + batch["segment_ids"].astype(bool).sum(axis=1)
        # padding is written too, and a write past the end would be moved back over real slots
        needed = max(int(starts.max()) + length, int(used.max()) + new_tokens, cache_length)
        needed = length_bucket(needed)
        if cache is not None and cache["segment_ids"].shape[1] < needed:
            cache = self._grow(cache, length=needed)
        batch = {key: batch[key] for key in _inputs(batch)}
        stop = np.asarray(not ignore_eos)
        return self._prefill(self.params, batch, cache, starts, controls, stop, length=needed)

    def decode(self, state: State, controls: Controls, steps: int, *, ignore_eos: bool = False) -> State:
        """At most `steps` more tokens, fewer when every row has stopped; `state` is given up."""
        return self._decode(self.params, state, controls, np.int32(steps), np.asarray(not ignore_eos))

    def generate(
        self,
        batch: Batch,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        *,
        ignore_eos: bool = False,
        cache_length: int = 0,
    ) -> np.ndarray:
        """Answers of a batch of prompts, one conversation a row, padded on either side.

        Returns:
          int32 [B, N]: the new ids, the stop id included, padding after it; N is the longest answer, or
          max_new_tokens with ignore_eos.

        Raises UserError when prompt and answer exceed `max_length`.
        """
        rows = len(batch["tokens"])
        lengths = np.asarray(batch["segment_ids"]).astype(bool).sum(axis=1)
        self.check_length(int(lengths.max(initial=0)), max_new_tokens)
        batch = pad_batch(left_aligned(batch), self.layout)
        controls = (sampling or Sampling()).controls(len(batch["tokens"]), rows)
        state = self.prefill(
            batch, controls, new_tokens=max_new_tokens, cache_length=cache_length, ignore_eos=ignore_eos
        )
        state = self.decode(state, controls, max_new_tokens - 1, ignore_eos=ignore_eos)
        return np.asarray(state.output)[:rows, : int(state.count)]


def answer_ids(output: np.ndarray, stop_ids: tuple[int, ...]) -> list[int]:
    """One row of `Generator.generate` up to its stop id, which is left out.

    >>> answer_ids(np.array([7, 8, 3, 0, 0]), (3,))
    [7, 8]
    """
    stops = np.flatnonzero(np.isin(output, stop_ids))
    return [int(i) for i in output[: stops[0] if len(stops) else None]]


def _inputs(batch: Batch) -> list[str]:
    keys = ["tokens", "segment_ids", "positions"]
    unread = (*keys, "media_index", "image_segment_ids", "audio_segment_ids")
    media = sorted(key for key in batch if key not in unread)
    return keys + (["media_index", *media] if media else [])


def _stops(tokens: jax.Array, stop_ids: tuple[int, ...], stop: jax.Array) -> jax.Array:
    return jnp.isin(tokens, jnp.asarray(stop_ids, jnp.int32)) & stop


def _prefill(
    self: Generator,
    params: Any,
    batch: dict[str, jax.Array],
    cache: dict[str, jax.Array] | None,
    starts: jax.Array,
    controls: Controls,
    stop: jax.Array,
    *,
    length: int,
) -> State:
    self.traces["prefill"] += 1
    rows = batch["tokens"].shape[0]
    config = self.model.config
    if cache is None:
        cache = init_cache(config.decoder, rows, length, jnp.dtype(config.dtype))
    length = cache["segment_ids"].shape[1]
    logits, cache = self.model.apply({"params": params}, batch, cache, starts, method="extend")
    counts = jnp.sum(batch["segment_ids"] > 0, axis=1, dtype=jnp.int32)
    last = jnp.maximum(counts - 1, 0)[:, None]
    # of all tokens, because those of media (M-RoPE) may be further than the last one
    reached = jnp.where(
        batch["segment_ids"] > 0, rearrange(batch["positions"], "b s ... -> b s (...)").max(-1), -1
    )
    positions = jnp.max(reached, axis=1) + 1
    tokens = sample(jnp.take_along_axis(logits, last[..., None], axis=1)[:, 0], controls, positions)
    empty = counts == 0
    tokens = jnp.where(empty, self.layout.pad_id, tokens)
    output = jnp.full((rows, length), self.layout.pad_id, jnp.int32).at[:, 0].set(tokens)
    stopped = empty | _stops(tokens, self.stop_ids, stop)
    return State(cache, tokens, starts + counts, positions, stopped, output, jnp.int32(1))


def _decode(
    self: Generator, params: Any, state: State, controls: Controls, steps: jax.Array, stop: jax.Array
) -> State:
    self.traces["decode"] += 1
    last = state.count + steps

    def unfinished(s: State) -> jax.Array:
        return (s.count < last) & ~jnp.all(s.stopped)

    def step(s: State) -> State:
        # a stopped row writes padding at the slot after its answer, again and again
        batch = {
            "tokens": s.tokens[:, None],
            "segment_ids": (~s.stopped).astype(jnp.int32)[:, None],
            "positions": s.positions[:, None],
        }
        logits, cache = self.model.apply({"params": params}, batch, s.cache, s.slots, method="extend")
        tokens = sample(logits[:, 0], controls, s.positions + 1)
        tokens = jnp.where(s.stopped, self.layout.pad_id, tokens)
        moved = (~s.stopped).astype(jnp.int32)
        return replace(
            s,
            cache=cache,
            tokens=tokens,
            slots=s.slots + moved,
            positions=s.positions + moved,
            stopped=s.stopped | _stops(tokens, self.stop_ids, stop),
            output=jax.lax.dynamic_update_slice(s.output, tokens[:, None], (0, s.count)),
            count=s.count + 1,
        )

    return jax.lax.while_loop(unfinished, step, state)


def _grow(self: Generator, cache: dict[str, jax.Array], *, length: int) -> dict[str, jax.Array]:
    """The cache with empty slots up to `length`."""
    self.traces["grow"] += 1
    more = length - cache["segment_ids"].shape[1]
    axes = {"key": 2, "value": 2, "segment_ids": 1}
    return {
        name: jnp.pad(array, [(0, more if axis == axes[name] else 0) for axis in range(array.ndim)])
        for name, array in cache.items()
    }
