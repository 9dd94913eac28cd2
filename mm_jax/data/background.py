"""An iterator that runs ahead of its reader in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Background:
    """Runs an iterator in a thread, `size` results ahead. Errors arrive at the reader in their order."""

    def __init__(self, make: Callable[[], Iterator[Any]], size: int):
        self._results: queue.Queue = queue.Queue(size)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name="mm_jax-data", daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[], Iterator[Any]]) -> None:
        results = make()
        try:
            for result in results:
                if not self._put((result, None)):
                    break
        except BaseException as error:
            self._put((None, error))
        finally:
            results.close()

    def _put(self, result: tuple[Any, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._results.put(result, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def get(self) -> Any:
        """The next result; raises what the iterator raised."""
        result, error = self._results.get()
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
