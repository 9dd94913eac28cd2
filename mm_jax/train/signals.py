"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Within `with`, the first SIGINT or SIGTERM sets `requested`; a second Ctrl-C interrupts as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Only the main thread may set handlers; elsewhere (a notebook's worker, a test) the caller decides.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        name = signal.Signals(number).name
        text = f"\n{name}: stopping after this step (Ctrl-C again: at once, unsaved)"
        print(text, file=sys.stderr, flush=True)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
