"""The thread that an engine runs in."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from mm_jax.inference.engine import Engine
from mm_jax.inference.prompt import Medium
from mm_jax.inference.request import Answer, Request
from mm_jax.serve.errors import ApiError

log = logging.getLogger("mm_jax.serve")


class Job:
    """One answer under way, as the rest of the server sees it.

    Attributes:
      answer: None until the engine has taken the request.
      error: what went wrong, "" for nothing.
    """

    def __init__(self, request: Request, moved: Callable[[Job], None]):
        self.request, self.moved = request, moved
        self.answer: Answer | None = None
        self.error = ""
        self.cancelled = False

    @property
    def over(self) -> bool:
        return bool(self.error) or self.cancelled or (self.answer is not None and bool(self.answer.finish))


class Worker:
    """Runs an engine in a thread of its own; jobs are handed over and report back from there.

    Attributes:
      ready: everything is compiled.
      failed: the thread has ended by itself.
      steps, tokens: engine steps, and tokens that were generated so far.

    Args:
      limit: jobs that may be under way or wait.
    """

    def __init__(self, engine: Engine, limit: int, media: Iterable[Medium] = ()):
        self.engine, self._limit, self._media = engine, limit, list(media)
        self.ready = self.failed = False
        self.steps = self.tokens = 0
        self._jobs: set[Job] = set()
        self._new: deque[Job] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def under_way(self) -> int:
        return len(self._jobs)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what is under way is cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(60)  # it may be compiling; it dies with the process

    def submit(self, jobs: list[Job]) -> None:
        """Hand over jobs, all or none. Raises ApiError 429 when too many are waiting already."""
        with self._wake:
            if self._stopping or self.failed:
                raise ApiError(503, "the server is stopping" if self._stopping else "the engine has failed")
            if len(self._jobs) + len(jobs) > self._limit:
                raise ApiError(429, "too many requests are waiting; try again later", code="queue_full")
            self._jobs.update(jobs)
            self._new.extend(jobs)
            self._wake.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """End jobs where they are; those that are over already are left alone."""
        with self._wake:
            for job in jobs:
                job.cancelled = True
            self._wake.notify()

    def _work(self) -> None:
        try:
            began = time.monotonic()
            self.engine.warm_up(self._media)
            self.ready = True
            log.info("ready after %.1f s", time.monotonic() - began)
            while self._turn():
                pass
        except BaseException:
            log.exception("the engine has failed")
            with self._wake:
                self.failed, self.ready = True, False
                for job in self._jobs:
                    job.error = "the engine has failed"
        finally:
            with self._wake:
                left, self._jobs = self._jobs, set()
            for job in left:
                job.cancelled = job.cancelled or not job.error
                job.moved(job)

    def _turn(self) -> bool:
        """One step of the engine, or a wait for work; False when the thread shall end."""
        with self._wake:
            while not (
                self._stopping or self._new or self.engine.busy or any(j.cancelled for j in self._jobs)
            ):
                self._wake.wait()
            if self._stopping:
                return False
            new, self._new = self._new, deque()
            jobs = list(self._jobs)  # others may be handed over at any time
        for job in new:
            if not job.cancelled:
                job.answer = self.engine.submit(job.request)
        for job in jobs:
            if job.cancelled and job.answer is not None:
                self.engine.cancel(job.answer)
        self._leave(job for job in jobs if job.cancelled)
        jobs = [job for job in jobs if not job.cancelled]
        before = [len(job.answer.tokens) for job in jobs]
        try:
            if self.engine.busy:
                self.engine.step()
                self.steps += 1
        except Exception as error:  # out of memory, most likely: later requests may be smaller
            log.exception("a step of the engine failed")
            for job in jobs:
                job.error = f"the engine failed: {type(error).__name__}"
            self.engine.reset()
        for job, seen in zip(jobs, before, strict=True):
            grown = len(job.answer.tokens) - seen
            self.tokens += grown
            if grown or job.over:
                job.moved(job)
        self._leave(job for job in jobs if job.over)
        return True

    def _leave(self, jobs: Iterable[Job]) -> None:
        with self._wake:
            self._jobs.difference_update(list(jobs))
