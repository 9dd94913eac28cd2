"""What /metrics tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from mm_jax.serve.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class _Engine:
    """Reads a worker's numbers when they are asked for."""

    def __init__(self, worker: Worker, slots: int):
        self._worker, self._slots = worker, slots

    def collect(self) -> Iterator[Metric]:
        worker, used = self._worker, self._worker.engine.running
        for name, text, value in (
            ("slots", "Rows of the batch", self._slots),
            ("slots_used", "Rows of the batch in use", used),
            ("queue", "Answers that wait for a row", max(worker.under_way - used, 0)),
            ("ready", "1 once everything is compiled", worker.ready),
        ):
            yield GaugeMetricFamily(f"mm_jax_{name}", text, value=float(value))
        for name, text, value in (
            ("generated_tokens", "Tokens generated", worker.tokens),
            ("engine_steps", "Steps of the engine", worker.steps),
            ("encoded_media", "Pictures and clips that went through an encoder", worker.engine.pool.encoded),
        ):
            yield CounterMetricFamily(f"mm_jax_{name}", text, value=float(value))


class Metrics:
    """Counters of one server."""

    def __init__(self, worker: Worker, slots: int):
        self.registry = registry = prometheus.CollectorRegistry()
        registry.register(_Engine(worker, slots))
        self.requests = prometheus.Counter(
            "mm_jax_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.prompt_tokens = prometheus.Counter(
            "mm_jax_prompt_tokens", "Tokens of prompts", ["reused"], registry=registry
        )
        self.first_token = prometheus.Histogram(
            "mm_jax_time_to_first_token_seconds",
            "From request to first text",
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = prometheus.Histogram(
            "mm_jax_answer_seconds", "From request to end of the answer", buckets=_SECONDS, registry=registry
        )

    def text(self) -> bytes:
        return prometheus.generate_latest(self.registry)
