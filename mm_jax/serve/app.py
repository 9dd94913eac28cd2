"""The application: routes, limits, and what happens around every request."""

from __future__ import annotations

import contextlib
import hmac
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from mm_jax.serve.api import Api
from mm_jax.serve.errors import ApiError
from mm_jax.serve.metrics import Metrics
from mm_jax.serve.options import ServeOptions
from mm_jax.serve.worker import Worker

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from mm_jax.lm import LanguageModel

log = logging.getLogger("mm_jax.serve")
PAGE = Path(__file__).with_name("page.html")
THREADS = 4  # that decode media; with dozens every one keeps memory of its own for the largest it has seen
PIECES = (1, 4)  # prompts that are read together: few sizes, as a server compiles all programs when it starts


def build(lm: LanguageModel, options: ServeOptions) -> Starlette:
    """An ASGI application; the engine's thread starts and ends with it."""
    longest = options.max_length or lm.max_length
    pieces = tuple(n for n in PIECES if n <= options.slots)
    engine = lm.engine(options.slots, steps=1, max_length=longest, cache_length=longest, pieces=pieces)
    worker = Worker(engine, options.slots + options.queue, lm.sample_media(longest))
    metrics = Metrics(worker, options.slots)
    api = Api(lm, worker, options, metrics)
    page = PAGE.read_text(encoding="utf-8")

    async def show_page(http: HttpRequest) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        worker.start()
        try:
            yield
        finally:
            worker.stop()

    routes = [
        Route("/", show_page),
        Route("/openapi.json", api.openapi),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        Route("/v1/models", api.models),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/embeddings", api.embeddings, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes, lifespan=life, exception_handlers={ApiError: _api_error, HTTPException: _http_error}
    )
    app.add_middleware(Guard, options=options, metrics=metrics, paths=frozenset(r.path for r in routes))
    return app


# the page is one file: nothing is loaded from elsewhere, and no other site may show it
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "media-src data: blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


async def _api_error(http: HttpRequest, error: ApiError) -> Response:
    return error.response()


async def _http_error(http: HttpRequest, error: HTTPException) -> Response:
    texts = {404: f"there is nothing at {http.url.path}", 405: f"{http.method} is not allowed here"}
    return ApiError(error.status_code, texts.get(error.status_code, error.detail)).response()


class Guard:
    """Checks the key and the size of a request, counts it, and answers our own mistakes in OpenAI's shape."""

    def __init__(self, app: ASGIApp, options: ServeOptions, metrics: Metrics, paths: frozenset[str]):
        self._app, self._options, self._metrics, self._paths = app, options, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._options.max_body:
                await self._drain(message, receive)
                raise self._too_large()
            return message

        try:
            headers = dict(scope["headers"])
            if path.startswith("/v1/"):
                self._check_key(headers.get(b"authorization", b""))
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self._options.max_body:
                await self._drain(await receive(), receive)
                raise self._too_large()
            await self._app(scope, limited, counted)
        except ApiError as error:
            if started:
                raise
            await error.response()(scope, receive, counted)
        except Exception:
            log.exception("%s %s", scope["method"], scope["path"])
            if started:
                raise
            await ApiError(500, "an error of the server; its log says more").response()(
                scope, receive, counted
            )

    def _check_key(self, header: bytes) -> None:
        wanted = f"Bearer {self._options.api_key}".encode()
        if self._options.api_key and not hmac.compare_digest(header, wanted):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _drain(self, message: Message, receive: Receive) -> None:
        """Take what is left of a body, within reason: a client that is still sending reads no answer."""
        left = 4 * self._options.max_body
        while left > 0 and message.get("more_body"):
            left -= len(message["body"])
            message = await receive()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._options.max_body} bytes", code="body_too_large")
