"""Goodput: which seconds count."""

import pytest

from mm_jax.train import goodput


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now - 7


def test_only_steps_count_and_lost_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    one = goodput.Goodput(began=1000.0)
    clock.now += 10  # start and compilation
    one.go()
    clock.now += 20
    with one.lost():
        clock.now += 10
    assert one.measure() == pytest.approx(20 / 40)
    assert one.measure() == pytest.approx(20 / 40)  # seconds count once
    one.stop()
    clock.now += 10
    assert one.measure() == pytest.approx(20 / 50)
    # a run that was killed here goes on from a checkpoint behind 15 of those seconds, half a minute later
    clock.now += 30
    again = goodput.Goodput(began=1000.0, productive=15.0)
    again.go()
    clock.now += 20
    assert again.measure() == pytest.approx(35 / 100)
