"""One answer of a request on its way from the engine's thread to the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mm_jax.data.messages import Box
from mm_jax.inference.request import Guide, Logprob, Request, settings_of
from mm_jax.inference.text import TextStream
from mm_jax.serve.worker import Job

if TYPE_CHECKING:
    from mm_jax.data.image import Transform
    from mm_jax.lm import LanguageModel
    from mm_jax.serve.schema import Settings


@dataclass(frozen=True)
class Piece:
    """What an answer grew by. finish: "" while it goes on."""

    text: str
    tokens: list[tuple[int, Logprob]] = field(default_factory=list)
    finish: str = ""
    error: str = ""


class Choice:
    """An answer's text, growing.

    Attributes:
      index: among the answers of the request.
      attention: where it looked, set by who knows, once it has ended.
      pieces: what comes, until one has a finish or an error.
    """

    def __init__(
        self,
        lm: LanguageModel,
        request: Request,
        settings: Settings,
        index: int,
        guide: Callable[[], Guide] | None,
        transforms: list[Transform],
    ):
        self.index = index
        self.attention: dict | None = None
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._stops = () if settings.ignore_eos else lm.stop_ids
        self._stream = TextStream(lm.processor, transforms, settings.stop)
        self._text, self._seen = "", 0
        request = settings_of(request, index)
        request = replace(request, guide=guide() if guide else None, watch=self._watch)
        self.job = Job(request, self._moved)

    @property
    def answer(self):
        return self.job.answer

    @property
    def ids(self) -> list[int]:
        """What the text was made of."""
        return self._stream.ids

    @property
    def text(self) -> str:
        """All that was said."""
        return self._stream.text

    def boxes(self) -> list[dict]:
        """Boxes of the answer in pixels of the original pictures."""
        parts = self._stream.parts(self._stream.ids)
        return [{"box": list(part.box), "image": part.image} for part in parts if isinstance(part, Box)]

    # both run in the engine's thread

    def _watch(self, token: int) -> bool:
        if token not in self._stops:
            self._text += self._stream.push([token])
        return self._stream.stopped

    def _moved(self, job: Job) -> None:
        answer = job.answer
        new = answer.logprobs[self._seen :] if answer else []
        tokens = list(zip(answer.tokens[self._seen :], new, strict=True)) if new else []
        self._seen += len(tokens)
        finish = ("cancelled" if job.cancelled else answer.finish) if job.over and not job.error else ""
        if job.over:
            self._text += self._stream.finish()
        piece = Piece(self._text, [pair for pair in tokens if pair[0] not in self._stops], finish, job.error)
        self._text = ""
        if piece.text or piece.tokens or finish or job.error:
            try:
                self._loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
            except RuntimeError:
                pass  # the server has stopped: nobody listens
