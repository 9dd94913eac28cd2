"""Ctrl-C, SIGTERM and notices of preemption as a request to stop after the current step."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from jax.experimental import multihost_utils

from mm_jax.parallel import processes


class StopSignals:
    """Within `with`, the first SIGINT or SIGTERM sets `requested`; a second Ctrl-C interrupts as usual.

    Among several processes SIGTERM to any of them, or a notice that its machine will be taken away, reaches all, and
    they agree on a step; JAX listens for it.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Only the main thread may set handlers; elsewhere (a notebook's worker, a test) the caller decides.
        if threading.current_thread() is threading.main_thread():
            mine = self.SIGNALS if processes.count() == 1 else (signal.SIGINT,)
            self._before = {number: signal.signal(number, self._stop) for number in mine}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; called after every step, which are numbered through all stages."""
        if processes.count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.requested = True
        return self.requested

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if processes.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # for JAX, which tells the others
        else:
            self.requested = True
        name = signal.Signals(number).name
        text = f"\n{name}: stopping after this step (Ctrl-C again: at once, unsaved)"
        print(text, file=sys.stderr, flush=True)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
