"""From pieces of answers to the JSON of OpenAI's API."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from mm_jax.agents.tools import Call, Style
from mm_jax.serve.choice import Choice, Piece
from mm_jax.serve.errors import ApiError
from mm_jax.serve.schema import Settings

if TYPE_CHECKING:
    from mm_jax.inference.request import Logprob
    from mm_jax.serve.api import Api


def usage_of(choices: list[Choice], n: int) -> dict[str, Any]:
    """Token counts; a prompt with several answers counts once."""
    answers = [choice.answer for choice in choices]
    prompt = sum(answer.request.prompt.length for answer in answers[::n])
    said = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": sum(answer.reused for answer in answers[::n])},
    }


class Writer:
    """Turns pieces into OpenAI's JSON."""

    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, api: Api, settings: Settings):
        self._api, self._settings = api, settings

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """The chunk of a choice before any text."""

    def chunks(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        """The choices of the chunks that a piece becomes."""
        raise NotImplementedError

    def choice(self, choice: Choice, pieces: list[Piece]) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    async def whole(
        self, events: AsyncIterator[tuple[Choice, Piece]], choices: list[Choice]
    ) -> dict[str, Any]:
        found: dict[int, list[Piece]] = {choice.index: [] for choice in choices}
        try:
            async for choice, piece in events:
                found[choice.index].append(piece)
        finally:
            await events.aclose()
        body = self._api.head(self.prefix, self.kind)
        body["choices"] = [self.choice(choice, found[choice.index]) for choice in choices]
        return body | {"usage": usage_of(choices, self._settings.n)}

    async def stream(
        self, events: AsyncIterator[tuple[Choice, Piece]], choices: list[Choice]
    ) -> AsyncIterator[str]:
        """Server-sent events."""
        head = self._api.head(self.prefix, self.chunk_kind)
        usage = {"usage": None} if self._settings.usage else {}

        def event(chunk: dict[str, Any]) -> str:
            return _event(head | {"choices": [chunk]} | usage)

        try:
            for choice in choices:
                if chunk := self.first(choice):
                    yield event(chunk)
            async for choice, piece in events:
                for chunk in self.chunks(choice, piece):
                    yield event(chunk)
            if usage:
                yield _event(head | {"choices": [], "usage": usage_of(choices, self._settings.n)})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())
        finally:
            await events.aclose()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


class ChatWriter(Writer):
    """Chat completions.

    Args:
      style: of tool calls; None where the request has no tools.
      forced: the answer is one call and nothing else.
    """

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, api: Api, settings: Settings, style: Style | None, forced: bool):
        super().__init__(api, settings)
        self._style, self._forced = style, forced
        self._raw: dict[int, str] = {}
        self._sent: dict[int, int] = {}

    def first(self, choice: Choice) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunks(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        index = choice.index
        raw = self._raw[index] = self._raw.get(index, "") + piece.text
        sent = self._sent.get(index, 0)
        safe = len(raw)
        if self._style is not None:
            safe = 0 if self._forced else max(self._style.safe(raw), sent)
        deltas: list[dict[str, Any]] = []
        if not piece.finish:
            deltas += [{"content": raw[sent:safe]}] if safe > sent else []
            self._sent[index] = safe
        else:
            text, calls = self._parse(raw)
            if calls:
                deltas += [{"content": text[sent:]}] if len(text) > sent else []
                deltas.append({"tool_calls": [{"index": k} | call for k, call in enumerate(_calls(calls))]})
            elif len(raw) > sent:
                deltas.append({"content": raw[sent:]})
            if boxes := choice.boxes():
                deltas.append({"boxes": boxes})
            if choice.attention is not None:
                deltas.append({"attention": choice.attention})
        found = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if piece.finish or (piece.tokens and not found):
            found.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": None})
        if piece.finish:
            found[-1]["finish_reason"] = "tool_calls" if calls else piece.finish
        if found and self._settings.top_logprobs is not None:
            found[0]["logprobs"] = self._logprobs(piece.tokens)
        return found

    def choice(self, choice: Choice, pieces: list[Piece]) -> dict[str, Any]:
        text, calls = self._parse("".join(piece.text for piece in pieces))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = _calls(calls)
        if boxes := choice.boxes():
            message["boxes"] = boxes
        if choice.attention is not None:
            message["attention"] = choice.attention
        tokens = [pair for piece in pieces for pair in piece.tokens]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": None if self._settings.top_logprobs is None else self._logprobs(tokens),
            "finish_reason": "tool_calls" if calls else pieces[-1].finish,
        }

    def _parse(self, text: str) -> tuple[str, list[Call]]:
        if self._style is None:
            return text, []
        return self._style.parse_forced(text) if self._forced else self._style.parse(text)

    def _logprobs(self, tokens: list[tuple[int, Logprob]]) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            text = self._api.token_text(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        most = self._settings.top_logprobs
        content = [
            entry(token, found.logprob) | {"top_logprobs": [entry(*pair) for pair in found.top[:most]]}
            for token, found in tokens
        ]
        return {"content": content, "refusal": None}


def _calls(calls: list[Call]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


class CompletionWriter(Writer):
    """Plain completions. echoed: text that stands before each prompt's answers."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, api: Api, settings: Settings, echoed: list[str]):
        super().__init__(api, settings)
        self._echoed = echoed

    def _before(self, choice: Choice) -> str:
        return self._echoed[choice.index // self._settings.n]

    def first(self, choice: Choice) -> dict[str, Any] | None:
        text = self._before(choice)
        return (
            {"index": choice.index, "text": text, "logprobs": None, "finish_reason": None} if text else None
        )

    def chunks(self, choice: Choice, piece: Piece) -> list[dict[str, Any]]:
        return [self._piece(choice, [piece], "")]

    def choice(self, choice: Choice, pieces: list[Piece]) -> dict[str, Any]:
        return self._piece(choice, pieces, self._before(choice))

    def _piece(self, choice: Choice, pieces: list[Piece], before: str) -> dict[str, Any]:
        tokens = [pair for piece in pieces for pair in piece.tokens]
        logprobs = None
        if self._settings.top_logprobs is not None:
            text, most = self._api.token_text, self._settings.top_logprobs
            logprobs = {
                "tokens": [text(token) for token, _ in tokens],
                "token_logprobs": [found.logprob for _, found in tokens],
                "top_logprobs": [{text(k): value for k, value in found.top[:most]} for _, found in tokens],
            }
        return {
            "index": choice.index,
            "text": before + "".join(piece.text for piece in pieces),
            "logprobs": logprobs,
            "finish_reason": pieces[-1].finish or None,
        }
