"""From logits to the next token: greedy, temperature, top-k, top-p, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from mm_jax.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      temperature: 0 takes the likeliest token, and the other fields then change nothing.
      top_k: sample among the k likeliest tokens; 0 for all.
      top_p: sample among the fewest tokens whose probabilities reach top_p (Holtzman et al. 2020).
      seed: of the random keys; a sequence gives every row its own.

    Raises UserError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or a number above 0")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def controls(self, rows: int, given: int | None = None) -> Controls:
        """The arrays of `rows` rows, of which the first `given` are real when seeds are given one a row.

        One seed serves all rows: what a row answers must depend neither on its place nor on its neighbours.
        """
        seeds = np.zeros(rows, np.uint32)
        if isinstance(self.seed, Sequence | np.ndarray):
            given = rows if given is None else given
            if len(self.seed) != given:
                raise UserError(f"{len(self.seed)} seeds for {given} rows; give one seed, or one a row")
            seeds[:given] = np.asarray(self.seed, np.int64).astype(np.uint32)
        else:
            seeds[:] = np.uint32(int(self.seed) % 2**32)
        return Controls(
            np.full(rows, self.temperature, np.float32),
            np.full(rows, self.top_k, np.int32),
            np.full(rows, self.top_p, np.float32),
            seeds,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Controls:
    """`Sampling` as arrays of one value a row, so that changing a setting compiles nothing."""

    temperature: jax.Array | np.ndarray  # float32 [B]
    top_k: jax.Array | np.ndarray  # int32 [B]
    top_p: jax.Array | np.ndarray  # float32 [B]
    seed: jax.Array | np.ndarray  # uint32 [B]


def top_k_logits(logits: jax.Array, k: jax.Array) -> jax.Array:
    """Logits with all but the k largest at -inf; k = 0 keeps all. Ties with the k-th largest stay.

    >>> top_k_logits(jnp.array([1.0, 3.0, 2.0]), 2).tolist()
    [-inf, 3.0, 2.0]
    """
    size = logits.shape[-1]
    ranked = jnp.sort(logits, axis=-1)
    k = jnp.where(k > 0, jnp.minimum(k, size), size)
    return jnp.where(logits < ranked[size - k], -jnp.inf, logits)


def top_p_logits(logits: jax.Array, p: jax.Array) -> jax.Array:
    """Logits with -inf outside the fewest likeliest tokens whose probabilities sum to at least p.

    With probabilities 0.5, 0.3, 0.2 and p = 0.6 the first two stay; the likeliest token always does.
    """
    order = jnp.argsort(-logits)
    ranked = jax.nn.softmax(logits[order])
    keep_ranked = (jnp.cumsum(ranked) - ranked < p).at[0].set(True)
    keep = jnp.zeros(logits.shape, bool).at[order].set(keep_ranked)
    # 1 means all: the running sum may round to 1 before the last token
    return jnp.where(keep | (p >= 1), logits, -jnp.inf)


def adjusted_logits(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """[V] -> [V]: temperature, then top-k, then top-p, the order of transformers' logits warpers."""
    logits = logits.astype(jnp.float32) / jnp.maximum(temperature, 1e-6)
    return top_p_logits(top_k_logits(logits, top_k), top_p)


def sample(logits: jax.Array, controls: Controls, positions: jax.Array) -> jax.Array:
    """The next token of every row.

    Args:
      logits: [B, V].
      positions: int32 [B], the position that the token will take. Folded into the row's key, so a row draws
        the same numbers alone, in a batch, streamed, or after a prompt that was read in several pieces.

    Returns:
      int32 [B].
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        def one(logits, temperature, top_k, top_p, seed, position):
            key = jax.random.fold_in(jax.random.key(seed), position)
            return jax.random.categorical(key, adjusted_logits(logits, temperature, top_k, top_p))

        c = controls
        drawn = jax.vmap(one)(logits, c.temperature, c.top_k, c.top_p, c.seed, positions)
        return jnp.where(c.temperature > 0, drawn.astype(jnp.int32), greedy)

    # sorting the vocabulary costs more than a small decoder's step: greedy batches skip it
    return jax.lax.cond(jnp.any(controls.temperature > 0), draw, lambda: greedy)
