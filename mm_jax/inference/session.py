"""A chat of several turns that keeps its KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mm_jax.data.messages import Audio, Box, Image, Message, Part, Text, Video
from mm_jax.errors import UserError
from mm_jax.inference.batch import collate_prompts, tail_of
from mm_jax.inference.generate import answer_ids
from mm_jax.inference.sampling import Sampling
from mm_jax.inference.text import TextStream, render

if TYPE_CHECKING:
    from mm_jax.lm import LanguageModel


class ChatSession:
    """Messages so far and the cache that has read them.

    The conversation is tokenised anew in every turn, and the cache is used for as many tokens as still agree.
    So an answer is always the one that reading everything from the start would give, whatever was cut off
    before.

    Attributes:
      messages: the conversation, answers included.
      prefilled: tokens that the last question made the model read.
    """

    def __init__(self, lm: LanguageModel, messages: Sequence[Message] = ()):
        self._lm = lm
        self.messages: list[Message] = list(messages)
        self._cache: dict | None = None
        self._tokens = np.zeros(0, np.int32)  # what the cache holds, by slot
        self._media: list[Part] = []  # the pictures and clips behind its media tokens
        self.prefilled = 0

    def reset(self) -> None:
        """Forget everything."""
        self.messages = []
        self._forget()

    def ask(
        self, parts: Sequence[Part] | str, *, max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> list[Part]:
        """Ask one question; the answer's parts, boxes in original pixels."""
        for _ in self.stream(parts, max_new_tokens=max_new_tokens, sampling=sampling):
            pass
        return list(self.messages[-1].parts)

    def stream(
        self, parts: Sequence[Part] | str, *, max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """Ask one question; pieces of the answer's text as they are made.

        What has been said when the iterator is closed stays in the conversation. A question that cannot be
        used raises UserError and leaves the conversation as it was.
        """
        parts = (Text(parts),) if isinstance(parts, str) else tuple(parts)
        if not any(
            isinstance(p, Image | Audio | Video) or (isinstance(p, Text) and p.text.strip()) for p in parts
        ):
            raise UserError("the question is empty")
        yield from self._answer(
            [*self.messages, Message("user", parts)], max_new_tokens, sampling or Sampling()
        )

    def _answer(self, messages: list[Message], max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        lm, generator = self._lm, self._lm.generator
        example = lm.prompt(messages)
        generator.check_length(example.length, max_new_tokens)
        media = [
            part for message in messages for part in message.parts if isinstance(part, Image | Audio | Video)
        ]
        if any(old is not new for old, new in zip(self._media, media, strict=False)):
            self._forget()  # all pictures have the same placeholder tokens
        start = min(_agreeing(example.tokens, self._tokens), example.length - 1)
        tail = tail_of(example, start, generator.layout)
        batch = collate_prompts([tail], generator.layout)
        controls = sampling.controls(1)
        # until the answer is done the cache is the program's: an interrupt must not leave us a part of it
        cache = self._cache
        self._forget()
        self.prefilled = example.length - start
        state = generator.prefill(
            batch, controls, new_tokens=max_new_tokens, cache=cache, starts=np.array([start], np.int32)
        )  # fmt: skip
        stream = TextStream(lm.processor, example.transforms)
        seen, said = 0, []
        try:
            while True:
                new = np.asarray(state.output)[0, seen : int(state.count)]
                seen += len(new)
                said += [int(i) for i in new]
                if piece := stream.push(answer_ids(new, generator.stop_ids)):
                    yield piece
                if bool(state.stopped[0]) or seen >= max_new_tokens:
                    break
                state = generator.decode(state, controls, 1)
            if piece := stream.finish():
                yield piece
        finally:
            answer = map(_repeatable, lm.processor.parts(stream.ids, example.transforms))
            self.messages = [*messages, Message("assistant", tuple(answer))]
        self._cache, self._media = state.cache, media
        # the last token was chosen but not read
        self._tokens = np.concatenate([example.tokens, np.asarray(said[:-1], np.int32)])

    def _forget(self) -> None:
        self._cache, self._tokens, self._media = None, np.zeros(0, np.int32), []


def _repeatable(part: Part) -> Part:
    """A box without area, which no prompt may hold, as text; every other part as it is."""
    if isinstance(part, Box) and not (part.box[0] < part.box[2] and part.box[1] < part.box[3]):
        return Text(render([part]))
    return part


def _agreeing(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens from the start are the same."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
