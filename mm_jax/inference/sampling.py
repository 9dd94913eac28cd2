"""From logits to the next token: penalties, bias, temperature, top-k, top-p, min-p, as pure functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from mm_jax.errors import UserError

ALTERNATIVES = 20  # likeliest tokens whose log-probabilities are reported
_TINY = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      temperature: 0 takes the likeliest token; seed, top_k, top_p and min_p then change nothing.
      top_k: sample among the k likeliest tokens; 0 for all.
      top_p: sample among the fewest tokens whose probabilities reach top_p (Holtzman et al. 2020).
      seed: of the random keys; a sequence gives every row of a batch its own.
      min_p: leave out tokens less likely than min_p times the likeliest one (Nguyen et al. 2024).
      repetition_penalty: divides positive and multiplies negative logits of tokens that the prompt or the answer
        holds (Keskar et al. 2019, section 4.1); 1 changes nothing.
      presence_penalty, frequency_penalty: taken off the logits of tokens that the answer holds, once or once for each
        time, as in OpenAI's API.
      logit_bias: token id -> number added to its logit.

    Raises UserError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | Sequence[int] = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or a number above 0")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; it must be 0 to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UserError(f"{name} is {getattr(self, name)}; it must be -2 to 2")
        if not all(math.isfinite(value) for value in self.logit_bias.values()):
            raise UserError("logit_bias must be finite numbers")

    def rows(self, count: int) -> list[Sampling]:
        """The settings of each of `count` rows, one seed a row.

        One seed serves all rows: what a row answers must depend neither on its place nor on its neighbours.
        """
        if not isinstance(self.seed, Sequence | np.ndarray):
            return [self] * count
        if len(self.seed) != count:
            raise UserError(f"{len(self.seed)} seeds for {count} rows; give one seed, or one a row")
        return [dataclasses.replace(self, seed=int(seed)) for seed in self.seed]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Controls:
    """`Sampling` as arrays of one value a row, so that changing a setting compiles nothing."""

    temperature: jax.Array | np.ndarray  # float32 [B]
    top_k: jax.Array | np.ndarray  # int32 [B]
    top_p: jax.Array | np.ndarray  # float32 [B]
    min_p: jax.Array | np.ndarray  # float32 [B]
    repetition: jax.Array | np.ndarray  # float32 [B]
    presence: jax.Array | np.ndarray  # float32 [B]
    frequency: jax.Array | np.ndarray  # float32 [B]
    seed: jax.Array | np.ndarray  # uint32 [B]
    biased: jax.Array | np.ndarray  # bool [B]
    masked: jax.Array | np.ndarray  # bool [B], only allowed tokens may be chosen
    alternatives: jax.Array | np.ndarray  # bool [B], log-probabilities of other tokens are wanted

    @classmethod
    def of(
        cls, rows: Sequence[Sampling], masked: Sequence[bool] = (), alternatives: Sequence[bool] = ()
    ) -> Controls:
        """One `Sampling` a row, each with a single seed."""

        def flags(values: Sequence[bool]) -> np.ndarray:
            return np.array(values, bool) if len(values) else np.zeros(len(rows), bool)

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(row, name) for row in rows], dtype)

        return cls(
            column("temperature", np.float32),
            column("top_k", np.int32),
            column("top_p", np.float32),
            column("min_p", np.float32),
            column("repetition_penalty", np.float32),
            column("presence_penalty", np.float32),
            column("frequency_penalty", np.float32),
            np.array([int(row.seed) % 2**32 for row in rows], np.uint32),
            np.array([bool(row.logit_bias) for row in rows]),
            flags(masked),
            flags(alternatives),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tables:
    """What rows remember about each token of the vocabulary.

    Attributes:
      counts: int32 [B, V], how often the answer holds it.
      prompted: bool [B, V], whether the prompt does; filled where there is a repetition penalty.
      bias: float32 [B, V]; filled where there is a bias.
    """

    counts: jax.Array
    prompted: jax.Array
    bias: jax.Array

    @classmethod
    def empty(cls, rows: int, vocab: int) -> Tables:
        shape = (rows, vocab)
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """Tokens int32 [B] with the log-probability float32 [B] that the model gives them before any setting changes its
    logits, and the `ALTERNATIVES` likeliest tokens with theirs: [B, A]. Both are zeros where nobody asked."""

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


def mask_words(vocab: int) -> int:
    """Words of 32 bits that hold one bit a token."""
    return -(-vocab // 32)


def kept_logits(logits: jax.Array, k: jax.Array, p: jax.Array) -> jax.Array:
    """[V] -> [V] with -inf outside top-k, and of what is left outside top-p. k = 0 and p = 1 keep all.

    Top-p keeps the fewest likeliest tokens whose probabilities sum to at least p: with 0.5, 0.3, 0.2 and p = 0.6 the
    first two. Ties with the last kept token stay.

    >>> kept_logits(jnp.array([1.0, 3.0, 2.0]), 2, 1.0).tolist()
    [-inf, 3.0, 2.0]
    """
    size = logits.shape[-1]
    ranked = jnp.sort(logits, descending=True)
    k = jnp.where(k > 0, jnp.minimum(k, size), size)
    probabilities = jax.nn.softmax(jnp.where(jnp.arange(size) < k, ranked, -jnp.inf))
    before = jnp.cumsum(probabilities) - probabilities
    # 1 means all: the running sum may round to 1 before the last token
    inside = (jnp.arange(size) < k) & ((before < p) | (p >= 1))
    last = jnp.maximum(jnp.sum(inside), 1) - 1
    return jnp.where(logits < ranked[last], -jnp.inf, logits)


def adjusted_logits(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
    """[V] -> [V]: temperature, top-k, top-p, min-p, the order of transformers' logits warpers."""
    logits = kept_logits(logits / jnp.maximum(temperature, _TINY), top_k, top_p)
    floor = jnp.max(logits) + jnp.log(jnp.maximum(min_p, 1e-38))
    return jnp.where((min_p > 0) & (logits < floor), -jnp.inf, logits)


def penalised(logits: jax.Array, controls: Controls, tables: Tables) -> jax.Array:
    """[B, V] -> [B, V] with the repetition penalty, then those of presence and frequency."""
    said = tables.counts > 0
    factor = controls.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    logits = jnp.where((said | tables.prompted) & (factor != 1), repeated, logits)
    return logits - controls.presence[:, None] * said - controls.frequency[:, None] * tables.counts


def allow(logits: jax.Array, masked: jax.Array, allowed: jax.Array) -> jax.Array:
    """-inf for the tokens of masked rows whose bit in `allowed` uint32 [B, words] is not set, lowest bit first."""
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bits = bits.reshape(allowed.shape[0], -1)[:, : logits.shape[1]].astype(bool)
    return jnp.where(bits | ~masked[:, None], logits, -jnp.inf)


def sample(
    logits: jax.Array, controls: Controls, tables: Tables, allowed: jax.Array, positions: jax.Array
) -> Choice:
    """The next token of every row.

    What a row does not ask for costs nothing when no other row of the batch does either: sorting a vocabulary takes
    longer than a step of a small decoder.

    Args:
      logits: float32 [B, V].
      allowed: uint32 [B, mask_words(V)], for masked rows.
      positions: int32 [B], the position that the token will take. Folded into the row's key, so a row draws the same
        numbers alone, in a batch, streamed, or after a prompt that was read in several pieces.
    """
    c = controls
    raw = logits

    def when(asked: jax.Array, change, logits: jax.Array) -> jax.Array:
        return jax.lax.cond(jnp.any(asked), change, lambda x: x, logits)

    penalty = (c.repetition != 1) | (c.presence != 0) | (c.frequency != 0)
    logits = when(penalty, lambda x: penalised(x, c, tables), logits)
    logits = when(c.biased, lambda x: x + jnp.where(c.biased[:, None], tables.bias, 0), logits)
    logits = when(c.masked, lambda x: allow(x, c.masked, allowed), logits)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        def narrow(x: jax.Array) -> jax.Array:
            return jax.vmap(adjusted_logits)(x, c.temperature, c.top_k, c.top_p, c.min_p)

        def heat(x: jax.Array) -> jax.Array:
            return x / jnp.maximum(c.temperature, _TINY)[:, None]

        narrowed = (c.temperature > 0) & ((c.top_k > 0) | (c.top_p < 1) | (c.min_p > 0))
        heated = jax.lax.cond(jnp.any(narrowed), narrow, heat, logits)

        def one(x: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
            return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), x)

        drawn = jax.vmap(one)(heated, c.seed, positions).astype(jnp.int32)
        return jnp.where(c.temperature > 0, drawn, greedy)

    tokens = jax.lax.cond(jnp.any(c.temperature > 0), draw, lambda: greedy)
    best = min(ALTERNATIVES, logits.shape[1])

    def report() -> tuple[jax.Array, jax.Array, jax.Array]:
        logprobs = jax.nn.log_softmax(raw)
        values, ids = jax.lax.top_k(logprobs, best)
        return jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0], ids.astype(jnp.int32), values

    def nothing() -> tuple[jax.Array, jax.Array, jax.Array]:
        rows = logits.shape[0]
        zeros = jnp.zeros((rows, best), jnp.float32)
        return jnp.zeros(rows, jnp.float32), zeros.astype(jnp.int32), zeros

    return Choice(tokens, *jax.lax.cond(jnp.any(c.alternatives), report, nothing))
