"""A trace of a few steps, for TensorBoard (profile plugin) and Perfetto."""

from __future__ import annotations

import sys
from pathlib import Path

import jax

from mm_jax.errors import UserError


class Profiler:
    """Traces the steps `first` to `last` of this process, counted from 1, into `directory`.

    The programs' scopes are the names of modules: decoder/layers/attention, vision, image_projector, ...
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps, self._directory = steps, directory
        self._count, self._running = 0, False

    def before_step(self) -> None:
        """Called before every step."""
        self._count += 1
        if self._steps is None:
            return
        if self._running and self._count > self._steps[1]:
            self.close()
        elif not self._running and self._count == self._steps[0]:
            jax.profiler.start_trace(str(self._directory), create_perfetto_trace=True)
            self._running = True

    def close(self) -> None:
        """Writes the trace of a profile that is still running."""
        if self._running:
            self._running = False
            for array in jax.live_arrays():
                array.block_until_ready()  # steps in flight belong to the trace
            jax.profiler.stop_trace()
            print(f"profile: {self._directory}", file=sys.stderr)


def parse_steps(text: str) -> tuple[int, int]:
    """`"10:13"` -> (10, 13), both included.

    Raises:
        UserError: anything else.
    """
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(f'--profile is "{text}"; first and last step are needed, such as 10:13')
    return int(first), int(last)
