"""Which part of a run's time brought it forward."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Goodput:
    """Seconds in steps that count, over seconds since the run began.

    Starting, compiling, waiting for data or a save, standing still, and steps that were lost with a process and done
    again do not count.

    Args:
      began: `time.time()` of the first start of the run.
      productive: seconds of the steps before, from the checkpoint.
    """

    def __init__(self, began: float, productive: float = 0.0):
        self.began, self.productive = began, productive
        self.stop()

    def go(self) -> None:
        """Steps begin to count."""
        self._since, self._lost = time.perf_counter(), 0.0

    def stop(self) -> None:
        """They do no longer."""
        self._since: float | None = None
        self._lost = 0.0

    @contextmanager
    def lost(self) -> Iterator[None]:
        """Time in the block does not count."""
        start = time.perf_counter()
        yield
        self._lost += time.perf_counter() - start

    def measure(self) -> float:
        """The goodput up to now."""
        if self._since is not None:
            now = time.perf_counter()
            self.productive += max(now - self._since - self._lost, 0.0)
            self._since, self._lost = now, 0.0
        return self.productive / max(time.time() - self.began, 1e-9)
