"""Traces of the steps that were asked for."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mm_jax.errors import UserError
from mm_jax.train.profile import Profiler, parse_steps


def test_the_steps_asked_for_are_traced(tmp_path: Path) -> None:
    profiler = Profiler((2, 3), tmp_path / "profile")
    step = jax.jit(lambda x: jnp.sin(x) @ x)
    x = step(jnp.ones((8, 8)))
    written = []
    for _ in range(4):
        profiler.before_step()
        x = step(x)
        written.append(bool(list(tmp_path.rglob("*.xplane.pb"))))
    assert written == [False, False, False, True]
    assert list(tmp_path.rglob("*perfetto_trace.json.gz"))
    profiler.close()


def test_a_run_that_ends_early_still_has_its_trace(tmp_path: Path) -> None:
    profiler = Profiler((1, 9), tmp_path / "profile")
    profiler.before_step()
    profiler.close()
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_no_steps_no_trace(tmp_path: Path) -> None:
    profiler = Profiler(None, tmp_path / "profile")
    profiler.before_step()
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_steps_in_words() -> None:
    assert parse_steps("10:13") == (10, 13)
    for text in ("10", "13:10", "0:3", "a:b"):
        with pytest.raises(UserError, match="such as 10:13"):
            parse_steps(text)
