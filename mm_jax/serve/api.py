"""The routes of OpenAI's API."""

from __future__ import annotations

import asyncio
import base64
import io
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import PIL.Image
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from mm_jax.agents.tools import Function, plain_messages, style_of, template_messages
from mm_jax.data.media import decode_image
from mm_jax.data.messages import Image, messages_from_json
from mm_jax.errors import UserError
from mm_jax.inference.attention import Look, check_looks, heat_picture, words_json, words_of
from mm_jax.inference.grammar import Grammars
from mm_jax.inference.prompt import Prompt, text_prompt
from mm_jax.inference.request import Answer, Guide, Request
from mm_jax.serve.choice import Choice, Piece
from mm_jax.serve.embeddings import embedded, embedding_list
from mm_jax.serve.errors import ApiError
from mm_jax.serve.openapi import document
from mm_jax.serve.remote import fetch_pictures
from mm_jax.serve.schema import (
    ChatRequest,
    EmbeddingRequest,
    Settings,
    chat_request,
    completion_request,
    embedding_request,
    inputs_of,
    read_json,
)
from mm_jax.serve.writers import ChatWriter, CompletionWriter, Writer

if TYPE_CHECKING:
    from mm_jax.data.example import Example
    from mm_jax.data.image import Transform
    from mm_jax.lm import LanguageModel
    from mm_jax.serve.metrics import Metrics
    from mm_jax.serve.options import ServeOptions
    from mm_jax.serve.worker import Worker


class Api:
    """Answers HTTP requests with a worker."""

    def __init__(self, lm: LanguageModel, worker: Worker, options: ServeOptions, metrics: Metrics):
        self._lm, self._worker, self._options, self._metrics = lm, worker, options, metrics
        self._style = style_of(lm.family)
        self._created = int(time.time())
        self._one = anyio.CapacityLimiter(1)  # attention of a whole conversation takes memory

    @cached_property
    def _grammars(self) -> Grammars:
        tokenizer = self._lm.processor.tokenizer.backend.to_str()
        return Grammars(tokenizer, self._lm.programs.vocab_size, self._lm.stop_ids)

    async def models(self, http: HttpRequest) -> Response:
        model = {"id": self._options.model, "object": "model", "created": self._created, "owned_by": "mm_jax"}
        about = {"family": self._lm.family, "max_model_len": self._worker.engine.max_length}
        return JSONResponse({"object": "list", "data": [model | about]})

    async def health(self, http: HttpRequest) -> Response:
        """503 until everything is compiled, and when the engine has failed."""
        status = "ok" if self._worker.ready else "failed" if self._worker.failed else "starting"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def openapi(self, http: HttpRequest) -> Response:
        return JSONResponse(document(self._options.model, bool(self._options.api_key)))

    async def metrics(self, http: HttpRequest) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions"""
        body = await self._body(http)
        began = time.monotonic()

        def read() -> tuple[ChatRequest, Example, Prompt, Callable[[], Guide] | None]:
            fetch_pictures(body.get("messages"), self._options.remote, self._options.max_images)
            wanted = chat_request(body, self._options, self._lm.takes_videos)
            functions = [] if wanted.choice == "none" else wanted.functions
            example = self._example(wanted.messages, functions)
            if wanted.attention:
                try:
                    check_looks(self._lm, example, wanted.settings.max_tokens or 0)
                except UserError as error:
                    raise ApiError(400, str(error), param="attention") from None
            return wanted, example, self._lm.read(example), self._guide(wanted)

        wanted, example, prompt, guide = await _in_thread(read)
        style = self._style if wanted.functions and wanted.choice != "none" else None
        forced = wanted.choice == "required" or wanted.choice.startswith("=")
        writer = ChatWriter(self, wanted.settings, style, forced)
        choices = self._submit([prompt], wanted.settings, example.transforms, guide)
        look = partial(self._look, wanted, example) if wanted.attention else None
        return await self._respond(http, choices, wanted.settings, writer, began, look)

    def _look(self, wanted: ChatRequest, example: Example, choice: Choice) -> dict[str, Any]:
        """Where the model looked for the words of an answer that has ended."""
        sources = []
        if wanted.attention.pictures:
            parts = [
                part for m in messages_from_json(plain_messages(wanted.messages, [])) for part in m.parts
            ]
            sources = [decode_image(part.source) for part in parts if isinstance(part, Image)]

        def draw(word: int, look: Look) -> str:
            return _png_url(heat_picture(sources[look.image], look))

        words = words_of(self._lm.processor, choice.ids, example.transforms)
        words = [word for word in words if word.end <= len(choice.text)]  # without what a stop text has cut
        chosen = range(len(words)) if wanted.attention.words is None else wanted.attention.words
        return {"words": words_json(self._lm, example, choice.ids, words, chosen, draw if sources else None)}

    def _example(self, messages: list[dict[str, Any]], functions: list[Function]) -> Example:
        """The prompt, with functions in the way of the model's template where it has one that knows them."""
        template = self._lm.processor.template
        if self._lm.checkpoint is None or template is None or "tools" not in template.source:
            return self._lm.prompt(plain_messages(messages, functions))
        tools = [function.to_json() for function in functions]
        return self._lm.prompt(template_messages(messages), tools=tools or None)

    def _guide(self, wanted: ChatRequest) -> Callable[[], Guide] | None:
        """What makes a guide for each answer; one is made here, so that a bad schema is refused at once."""
        if wanted.functions and (wanted.choice == "required" or wanted.choice.startswith("=")):
            named = [f for f in wanted.functions if wanted.choice in ("required", f"={f.name}")]
            functions, style = [(f.name, f.parameters) for f in named], self._style

            def make() -> Guide:
                return self._grammars.calls(functions, style.begin, style.end, style.key)
        elif wanted.form is not None:

            def make() -> Guide:
                return self._grammars.json(wanted.form)
        else:
            return None
        make()
        return make

    async def completions(self, http: HttpRequest) -> Response:
        """POST /v1/completions"""
        body = await self._body(http)
        began = time.monotonic()
        wanted = completion_request(body, self._options)
        # as the reference's tokenizers do, with the token for the beginning of a text
        around = {} if self._lm.checkpoint is None else {"around": True}
        encode = partial(self._lm.processor.tokenizer.encode, **around)

        def read() -> tuple[list[Prompt], list[str]]:
            vocab = self._lm.programs.vocab_size
            ids = [list(encode(p)) if isinstance(p, str) else p for p in wanted.prompts]
            if any(not 0 <= token < vocab for row in ids for token in row):
                raise ApiError(400, f"a token id is outside of 0 to {vocab - 1}", param="prompt")
            echoed = [
                p if isinstance(p, str) else self._lm.processor.tokenizer.decode(p) for p in wanted.prompts
            ]
            return [text_prompt(row) for row in ids], echoed

        prompts, echoed = await _in_thread(read)
        writer = CompletionWriter(self, wanted.settings, echoed if wanted.echo else [""] * len(prompts))
        choices = self._submit(prompts, wanted.settings, [], None)
        return await self._respond(http, choices, wanted.settings, writer, began)

    async def embeddings(self, http: HttpRequest) -> Response:
        """POST /v1/embeddings"""
        body = await self._body(http)
        began = time.monotonic()

        def read() -> tuple[EmbeddingRequest, list[Request]]:
            asked = [{"content": one} for one in inputs_of(body)]
            fetch_pictures(asked, self._options.remote, self._options.max_images)
            known = self._lm.embedding_size, self._lm.takes_videos
            wanted = embedding_request(body, self._options, *known)
            prompts = map(self._lm.embedding_prompt, wanted.inputs)
            requests = [Request(prompt, max_new_tokens=1, embed=True) for prompt in prompts]
            for request in requests:
                self._check(request)
            return wanted, requests

        wanted, requests = await _in_thread(read)
        left = self._options.timeout - (time.monotonic() - began)
        answers = await _unless_gone(http, embedded(self._worker, requests, self._options.slots, left))
        if answers is None:
            return Response(status_code=499)  # nobody reads it
        self._metrics.duration.observe(time.monotonic() - began)
        self._count_prompts(answers)
        return JSONResponse(embedding_list(answers, wanted.packed, self._options.model))

    async def _body(self, http: HttpRequest) -> dict[str, Any]:
        body = await _in_thread(read_json, await http.body())
        model = body.get("model")
        if model is not None and model != self._options.model:
            if not isinstance(model, str):
                raise ApiError(400, "model must be a text", param="model")
            text = f'there is no model "{model[:200]}" here; this is "{self._options.model}"'
            raise ApiError(404, text, param="model", code="model_not_found")
        return body

    def _submit(
        self,
        prompts: list[Prompt],
        settings: Settings,
        transforms: list[Transform],
        guide: Callable[[], Guide] | None,
    ) -> list[Choice]:
        choices = []
        for prompt in prompts:
            room = max(self._worker.engine.max_length - prompt.length, 1)
            most, logprobs = settings.max_tokens or room, settings.top_logprobs is not None
            request = Request(prompt, settings.sampling, most, settings.ignore_eos, logprobs)
            self._check(request)
            for k in range(settings.n):
                choices.append(Choice(self._lm, request, settings, k, guide, transforms))
        for k, choice in enumerate(choices):
            choice.index = k
        self._worker.submit([choice.job for choice in choices])
        return choices

    def _check(self, request: Request) -> None:
        try:
            self._worker.engine.check(request)
        except UserError as error:
            code = "context_length_exceeded" if "limit" in str(error) else None
            raise ApiError(400, str(error), code=code) from None

    def _count_prompts(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            self._metrics.prompt_tokens.labels("yes").inc(answer.reused)
            self._metrics.prompt_tokens.labels("no").inc(answer.request.prompt.length - answer.reused)

    async def _respond(
        self,
        http: HttpRequest,
        choices: list[Choice],
        settings: Settings,
        writer: Writer,
        began: float,
        look: Callable[[Choice], dict[str, Any]] | None = None,
    ) -> Response:
        events = self._events(choices, began, look)
        if settings.stream:
            return StreamingResponse(
                writer.stream(events, choices),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        try:
            whole = await _unless_gone(http, writer.whole(events, choices))
            return Response(status_code=499) if whole is None else JSONResponse(whole)
        finally:
            self._worker.cancel(choice.job for choice in choices)

    async def _events(
        self, choices: list[Choice], began: float, look: Callable[[Choice], dict[str, Any]] | None
    ) -> AsyncIterator[tuple[Choice, Piece]]:
        """The pieces of all choices as they come, until each has ended. Raises ApiError: timeout, engine failed."""
        merged: asyncio.Queue[tuple[Choice, Piece]] = asyncio.Queue()

        async def forward(choice: Choice) -> None:
            while True:
                piece = await choice.pieces.get()
                await merged.put((choice, piece))
                if piece.finish or piece.error:
                    return

        tasks = [asyncio.ensure_future(forward(choice)) for choice in choices]
        left, first = len(choices), True
        try:
            while left:
                rest = self._options.timeout - (time.monotonic() - began)
                try:
                    choice, piece = await asyncio.wait_for(merged.get(), rest)
                except TimeoutError:
                    raise ApiError(
                        504, f"no answer within {self._options.timeout:g} s", code="timeout"
                    ) from None
                if piece.error:
                    raise ApiError(500, piece.error)
                if piece.finish == "cancelled":
                    raise ApiError(503, "the server is stopping")
                if first:
                    self._metrics.first_token.observe(time.monotonic() - began)
                    first = False
                left -= bool(piece.finish)
                if piece.finish and look:
                    choice.attention = await _in_thread(look, choice, limiter=self._one)
                yield choice, piece
            self._metrics.duration.observe(time.monotonic() - began)
            self._count_prompts(choice.answer for choice in choices)
        finally:
            for task in tasks:
                task.cancel()
            self._worker.cancel(choice.job for choice in choices)

    def head(self, prefix: str, kind: str) -> dict[str, Any]:
        """What every answer begins with."""
        name = f"{prefix}-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self._options.model}

    def token_text(self, token: int) -> str:
        return self._lm.processor.tokenizer.decode([token])


async def _in_thread(
    function: Callable, *arguments: Any, limiter: anyio.CapacityLimiter | None = None
) -> Any:
    """Work that takes time, such as decoding pictures; a user's mistake becomes a 400."""
    try:
        return await anyio.to_thread.run_sync(function, *arguments, limiter=limiter)
    except UserError as error:
        raise ApiError(400, str(error)) from None


def _png_url(picture: PIL.Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


async def _unless_gone(http: HttpRequest, work: Coroutine[Any, Any, Any]) -> Any:
    """What the work ends with; None once the client has gone, as nobody reads it."""
    gone, task = asyncio.ensure_future(_disconnected(http)), asyncio.ensure_future(work)
    # what it ends with is of no interest once the client has gone
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
