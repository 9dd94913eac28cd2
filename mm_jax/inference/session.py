"""A chat of several turns that keeps its KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mm_jax.data.messages import Audio, Box, Image, Message, Part, Text, Video
from mm_jax.errors import UserError
from mm_jax.inference.request import Request
from mm_jax.inference.sampling import Sampling
from mm_jax.inference.text import TextStream, answer_ids, render

if TYPE_CHECKING:
    from mm_jax.lm import LanguageModel


class ChatSession:
    """Messages so far, and an engine of one row whose cache has read them.

    The conversation is tokenised anew in every turn, and the engine uses its cache for as many tokens as still agree.
    So an answer is always the one that reading everything from the start would give, whatever was cut off before.

    Attributes:
      messages: the conversation, answers included.
      prefilled: tokens that the last question made the model read.
    """

    def __init__(self, lm: LanguageModel, messages: Sequence[Message] = ()):
        self._lm = lm
        self._engine = lm.engine(1, steps=1)
        self.messages: list[Message] = list(messages)
        self.prefilled = 0

    def reset(self) -> None:
        """Forget everything."""
        self.messages = []
        self._engine.reset()

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
        lm, engine = self._lm, self._engine
        example = lm.prompt(messages)
        answer = engine.submit(Request(lm.read(example), sampling, max_new_tokens))
        stream = TextStream(lm.processor, example.transforms)
        seen = 0
        try:
            while not answer.finish:
                engine.step()
                new = answer.tokens[seen:]
                seen += len(new)
                if piece := stream.push(answer_ids(new, lm.stop_ids)):
                    yield piece
            if piece := stream.finish():
                yield piece
        finally:
            engine.cancel(answer)
            self.prefilled = example.length - answer.reused
            parts = map(_repeatable, lm.processor.parts(stream.ids, example.transforms))
            self.messages = [*messages, Message("assistant", tuple(parts))]


def _repeatable(part: Part) -> Part:
    """A box without area, which no prompt may hold, as text; every other part as it is."""
    if isinstance(part, Box) and not (part.box[0] < part.box[2] and part.box[1] < part.box[3]):
        return Text(render([part]))
    return part
