"""What is asked of an engine, and what comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mm_jax.inference.prompt import Prompt
from mm_jax.inference.sampling import Sampling


class Guide(Protocol):
    """What a token may be, step by step, such as a grammar."""

    def mask(self) -> np.ndarray:
        """uint32 [words]: one bit a token, set where it may come next."""

    def accept(self, token: int) -> bool:
        """Take note of the token that was chosen; True when nothing may follow it."""


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
      max_new_tokens: longest answer.
      ignore_eos: go on after a stop token.
      logprobs: report log-probabilities.
      guide: restricts what may be said; used up by one request.
      watch: called with each new token; True ends the answer with it.
      tag: of no meaning to the engine; to find the request again.
      embed: nothing is said: the answer is what the decoder has made of the prompt, see `Answer.hidden`.
    """

    prompt: Prompt
    sampling: Sampling = Sampling()
    max_new_tokens: int = 64
    ignore_eos: bool = False
    logprobs: bool = False
    guide: Guide | None = None
    watch: Callable[[int], bool] | None = None
    tag: Any = None
    embed: bool = False


@dataclass(frozen=True)
class Logprob:
    """Natural logarithm of a token's probability, and (token, logprob) of the likeliest tokens at its place."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Answer:
    """What has been said so far.

    Attributes:
      tokens: ids, a stop token included.
      logprobs: of each token, where they were asked for.
      finish: "" while it goes on; "stop", "length", or "cancelled".
      reused: tokens of the prompt that a cache had read before.
      hidden: float32 [D], what the decoder's last layer and final norm have made of the prompt's last token, where that
        was asked for.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish: str = ""
    reused: int = 0
    hidden: np.ndarray | None = None


def settings_of(request: Request, index: int) -> Request:
    """The request for the index-th of several answers to one prompt: each has its own seed, whatever the batch."""
    seed = (int(request.sampling.seed) + index * 0x9E3779B9) % 2**32
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seed))
