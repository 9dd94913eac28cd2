"""Answers that follow a JSON schema or another grammar, by llguidance (extra `serve`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mm_jax.errors import UserError
from mm_jax.inference.sampling import mask_words

# a model may fill the room between tokens with line breaks for ever
_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes guides for one tokenizer.

    Args:
      tokenizer: the JSON of a `tokenizers.Tokenizer`.
      vocab_size: logits of the model.
      stop_ids: tokens that end an answer.

    Raises UserError when llguidance is not installed.
    """

    def __init__(self, tokenizer: str, vocab_size: int, stop_ids: Sequence[int]):
        try:
            import llguidance
        except ImportError:
            raise UserError(
                "answers in a given form need llguidance; install mm_jax with its extra: pip install 'mm_jax[serve]'"
            ) from None
        self._library, self._words = llguidance, mask_words(vocab_size)
        self._tokenizer = llguidance.LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(stop_ids))

    def json(self, schema: Mapping[str, Any]) -> GrammarGuide:
        """JSON that a schema allows; {} allows any. Raises UserError for a schema that cannot be followed."""
        return self._guide(f"start: %json {json.dumps(_with_options(schema))}")

    def calls(
        self, functions: Sequence[tuple[str, Mapping[str, Any]]], begin: str, end: str, key: str
    ) -> GrammarGuide:
        """Exactly one call of one of the functions, (name, schema of the arguments).

        begin, end: texts around it; key: under which its JSON has the arguments.
        """
        schemas = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, key: schema or {"type": "object"}},
                "required": ["name", key],
                "additionalProperties": False,
            }
            for name, schema in functions
        ]
        options = " | ".join(f"call_{k}" for k in range(len(schemas)))
        rules = [f"call_{k}: %json {json.dumps(_with_options(schema))}" for k, schema in enumerate(schemas)]
        around = [json.dumps(text) if text else "" for text in (begin, end)]
        return self._guide("\n".join([f"start: {around[0]} ({options}) {around[1]}", *rules]))

    def _guide(self, grammar: str) -> GrammarGuide:
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"the answer's form cannot be followed: {matcher.get_error().splitlines()[0]}")
        return GrammarGuide(matcher, self._words)


def _with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": _OPTIONS}


class GrammarGuide:
    """A `mm_jax.inference.request.Guide` over one llguidance matcher."""

    def __init__(self, matcher: Any, words: int):
        self._matcher, self._words = matcher, words

    def mask(self) -> np.ndarray:
        """uint32 [words]: one bit a token, set where it may come next."""
        allowed = np.zeros(self._words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
        return allowed

    def accept(self, token: int) -> bool:
        """Take note of the token that was chosen; True when nothing may follow it."""
        self._matcher.consume_token(token)
        return self._matcher.is_stopped()
