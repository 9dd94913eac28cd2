"""Vectors of inputs on their way from the engine's thread to the client."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

from mm_jax.inference.embedding import unit
from mm_jax.inference.request import Answer, Request
from mm_jax.serve.errors import ApiError
from mm_jax.serve.worker import Job, Worker

_PAUSE = 0.05  # seconds until the rest of a request that has begun asks for room again


class _Input:
    """One input under way. over: of its job."""

    def __init__(self, request: Request):
        self._loop = asyncio.get_running_loop()
        self.over = asyncio.Event()
        self.job = Job(request, self._moved)

    def _moved(self, job: Job) -> None:
        """Runs in the engine's thread."""
        if job.over:
            try:
                self._loop.call_soon_threadsafe(self.over.set)
            except RuntimeError:
                pass  # the server has stopped: nobody listens


async def embedded(
    worker: Worker, requests: Sequence[Request], together: int, seconds: float
) -> list[Answer]:
    """The answers to requests for vectors.

    Args:
      together: inputs under way at a time, so that a long list leaves room for others.

    Raises ApiError: 429 where nothing is free to begin with, a timeout, an engine that has failed or stops.
    """
    inputs, room, begun = [_Input(request) for request in requests], asyncio.Semaphore(together), False

    async def one(each: _Input) -> Answer:
        nonlocal begun
        async with room:
            while True:
                try:
                    worker.submit([each.job])
                    begun = True
                    break
                except ApiError as error:
                    if error.status != 429 or not begun:
                        raise
                await asyncio.sleep(_PAUSE)
            await each.over.wait()
        if each.job.error:
            raise ApiError(500, each.job.error)
        if each.job.cancelled:
            raise ApiError(503, "the server is stopping")
        return each.job.answer

    tasks = [asyncio.ensure_future(one(each)) for each in inputs]
    try:
        return await asyncio.wait_for(asyncio.gather(*tasks), seconds)
    except TimeoutError:
        raise ApiError(504, "the vectors were not made in time", code="timeout") from None
    finally:
        for task in tasks:
            task.cancel()
        worker.cancel(each.job for each in inputs)


def embedding_list(answers: Sequence[Answer], packed: bool, model: str) -> dict[str, Any]:
    """The JSON of OpenAI's API; packed: float32, little-endian, in base64 instead of numbers."""
    vectors = unit([answer.hidden for answer in answers])
    read = sum(answer.request.prompt.length for answer in answers)
    data = [
        {
            "object": "embedding",
            "index": k,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
            if packed
            else vector.tolist(),
        }
        for k, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": read, "total_tokens": read}
    return {"object": "list", "data": data, "model": model, "usage": usage}
