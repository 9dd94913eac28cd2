"""Training batches: mix -> shuffle -> repeat -> encode -> pack -> batch, with an exact and small state.

The samples of a run come in *streams*: each takes every n-th sample of every source, in the same mixture, and packs
its own rows; a batch has equally many rows of each. A process reads one or several streams, so as many processes as
divide their number see the same batches. What stands at a position of a stream follows from (mixture, seed, position)
alone. Workers read it in order, whatever their number; packing happens behind them, in one place. So the state of a
stream is its next position and the positions of the samples in its open rows: an interrupted run fetches those again
and goes on with the same batches, bit for bit. A sample that cannot be used keeps its position: it is dropped and
counted behind the workers.

When a run goes on with processes that cannot share its streams, new ones begin where all the old ones have been: what
some of these had not come to yet, and what lay in open rows, is read first.
"""

from __future__ import annotations

import collections
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mm_jax.data.background import Background
from mm_jax.data.example import Example
from mm_jax.data.messages import Conversation
from mm_jax.data.packing import BatchConfig, Layout, collate
from mm_jax.data.sources import Source
from mm_jax.data.stream import Encoder, Order, Sample, State, Stream, add_drops, empty_state, share_out
from mm_jax.errors import UserError, nearest

__all__ = ["BatchConfig", "BatchInfo", "Layout", "TrainData", "merge"]

Batch = dict[str, np.ndarray]

PREFETCH_BATCHES = 2


@dataclasses.dataclass(frozen=True)
class BatchInfo:
    """What a batch holds, for the log. Counts are of this process.

    images, audio: slots in use. padding: share of positions without a token. trainable: tokens with a loss
    weight, by source. drops: samples refused since the start of the stage, by source and reason. epochs: how
    often each source has been gone through. samples: "source/id" of every example.
    """

    examples: int
    tokens: int
    images: int
    audio: int
    padding: float
    trainable: dict[str, int]
    drops: dict[str, dict[str, int]]
    epochs: dict[str, int]
    samples: tuple[str, ...]


class TrainData:
    """An endless iterator of (batch, info), made ahead of time in the background.

    Args:
        sources: the opened sources by name.
        mixture: source name -> weight; of the samples (not tokens) drawn, a source gives its share of the
            weights. A weight of 0 leaves a source out.
        batch: shapes and budgets of a batch; its rows are those of all processes.
        encode: conversation -> Example, must be picklable for workers > 0, raises `UserError` for a bad
            sample; a `reason` on the exception is the key under which the drop is counted.
        layout: shapes of the media slots, see `Layout.of`.
        seed: of the order within each source.
        workers: processes that read and encode; 0 does both in threads. Does not change the batches.
        process: (index, count) of this process among those that read different samples. It gets rows / count rows.
        strict: raise `UserError` at the first sample that cannot be used instead of dropping it.

    Names of the mixture, sorted, are numbered from 0 in `batch["sources"]`. Preference pairs (conversations
    with a rejected answer) are numbered by their place in their source; behind one another in the order of
    the names if there are several. An error in the background is raised by `next()`.

    >>> with TrainData(sources, {"a": 3, "b": 1}, batch_config, encode, layout) as data:  # doctest: +SKIP
    ...     batch, info = next(data)
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        mixture: Mapping[str, float],
        batch: BatchConfig,
        encode: Callable[[Conversation], Example],
        layout: Layout,
        *,
        seed: int = 0,
        workers: int = 0,
        process: tuple[int, int] = (0, 1),
        strict: bool = False,
    ):
        _check(sources, mixture, workers, process)
        self.names = tuple(sorted(mixture))
        drawn = {name: mixture[name] for name in self.names if mixture[name] > 0}
        lengths = {name: len(sources[name]) for name in drawn}
        self._fingerprint = {
            "mixture": {name: float(weight) for name, weight in drawn.items()},
            "samples": lengths,
            "seed": seed,
            "budget": [batch.length, batch.images, batch.audio, batch.pairs, batch.bins],
        }
        self._batch, self._layout, self._process = batch, layout, process
        self._workers, self._strict = workers, strict
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._order = Order(drawn, lengths, seed)
        self._messages: dict[tuple[str, str], str] = {}
        self._encoder = Encoder({name: sources[name] for name in drawn}, encode, batch)
        self._background: Background | None = None
        self._finalizer: weakref.finalize | None = None
        count = batch.streams or process[1]
        self._begin(dict.fromkeys(drawn, 0), [empty_state() for _ in range(count)])

    def _begin(self, origin: dict[str, int], states: list[State]) -> None:
        """Take this process's part of streams in these states."""
        (index, processes), count = self._process, len(states)
        if count % processes or self._batch.rows % count:
            raise UserError(
                f"batch.rows {self._batch.rows}, read in {count} streams by {processes} processes: streams must divide "
                "the rows, and processes the streams; change batch.rows, batch.streams or the number of processes"
            )
        for name, length in self._order.lengths.items():
            if not length:
                raise UserError(f'source "{name}" of the mixture holds no samples')
            if length < count:
                raise UserError(
                    f'source "{name}" holds {length} samples, fewer than the {count} processes or streams that are to '
                    "share them"
                )
        self._each = count // processes
        self._first, self._count, self._origin = index * self._each, count, origin
        self._states = states[self._first :][: self._each]

    def start(self) -> None:
        """Begin to prepare batches; `next()` does it too, this lets it overlap with compiling the model."""
        if self._background is None:
            streams = self.streams()
            self._background = Background(lambda: self._batches(streams), PREFETCH_BATCHES)
            # worker processes must be gone before the interpreter takes its modules apart
            self._finalizer = weakref.finalize(self, self._background.close)

    def streams(self) -> list[Stream]:
        """Those of this process, from where they stand."""
        return [
            Stream(
                self._order,
                (self._first + k, self._count),
                self._origin,
                state,
                self._encoder,
                (self._workers, 1 / self._each),
                self._strict,
                self._messages,
            )
            for k, state in enumerate(self._states)
        ]

    def __iter__(self) -> TrainData:
        return self

    def __next__(self) -> tuple[Batch, BatchInfo]:
        self.start()
        try:
            batch, info, self._states = self._background.get()
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):
                self.close()
            raise
        return batch, info

    def state(self) -> dict[str, Any]:
        """Where the streams of this process stand after the last batch handed out: small, plain JSON.

        With several processes `merge` makes one state of theirs.
        """
        place = {"origin": self._origin, "first": self._first, "streams": self._states}
        return {**place, **self._fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue behind the batch after which `state` was taken; the numbers of workers and processes may differ.

        Where the processes cannot share the streams of the state, or the rows of `batch` differ, new streams begin
        that leave nothing out and repeat nothing.

        Raises `UserError` if the state belongs to another mixture, seed or budget, or if a source has another number
        of samples now.
        """
        for key, value in self._fingerprint.items():
            if key not in state or state[key] != value:
                raise UserError(f"saved data state has {key} {state.get(key)}, this run has {value}")
        if "streams" not in state:
            raise UserError("saved data state is of an older version of mm_jax")
        self.close()
        origin, states = state["origin"], state["streams"]
        wanted, count = self._batch.streams, len(states)
        if count % self._process[1] or self._batch.rows % count or (wanted and wanted != count):
            origin, states = share_out(self._order, origin, states, wanted or self._process[1])
        self._begin(origin, states)

    @property
    def drops(self) -> dict[str, collections.Counter]:
        """Samples refused up to the last batch handed out: source -> reason -> count."""
        drops = add_drops(state["drops"] for state in self._states)
        return {name: collections.Counter(reasons) for name, reasons in drops.items()}

    @property
    def drop_messages(self) -> dict[tuple[str, str], str]:
        """The first message met for each (source, reason), to show what a count means."""
        return dict(self._messages)

    def _batches(self, streams: Sequence[Stream]) -> Iterator[tuple[Batch, BatchInfo, list[State]]]:
        """Triples of batch, info and the states behind the batch. Only the background thread runs it."""
        accumulate, each = self._batch.accumulate, self._batch.rows // self._count
        running = [stream.rows(each * accumulate) for stream in streams]
        try:
            while True:
                found = [next(rows) for rows in running]
                rows = [
                    row for a in range(accumulate) for part, _ in found for row in part[a * each :][:each]
                ]
                yield *self._collate(rows, [state for _, state in found]), [state for _, state in found]
        finally:
            for rows in running:
                rows.close()

    def _collate(self, rows: list[list[Sample]], states: list[State]) -> tuple[Batch, BatchInfo]:
        examples = [[sample.example for sample in row] for row in rows]
        batch = dataclasses.replace(self._batch, rows=len(rows) // self._batch.accumulate, streams=0)
        arrays = collate(examples, batch, self._layout, self._numbers)
        flat = [example for row in examples for example in row]
        trainable = dict.fromkeys(self._numbers, 0)
        for example in flat:
            trainable[example.source] += int(np.count_nonzero(example.loss_weights))
        tokens = sum(len(example.tokens) for example in flat)
        epochs: dict[str, int] = {}
        for state in states:
            epochs |= {name: max(epoch, epochs.get(name, 0)) for name, epoch in state["epochs"].items()}
        info = BatchInfo(
            examples=len(flat),
            tokens=tokens,
            images=sum(example.num_images for example in flat),
            audio=sum(example.num_audio for example in flat),
            padding=1 - tokens / (len(rows) * self._batch.length),
            trainable=trainable,
            drops=add_drops(state["drops"] for state in states),
            epochs=epochs,
            samples=tuple(sample.id for row in rows for sample in row),
        )
        return arrays, info

    def close(self) -> None:
        """Stop the background work. Harmless when repeated; `next()` would go on behind the last batch."""
        if self._background is not None:
            self._finalizer.detach()
            self._background.close()
            self._background = None

    def __enter__(self) -> TrainData:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check(
    sources: Mapping[str, Source], mixture: Mapping[str, float], workers: int, process: tuple[int, int]
) -> None:
    for name, weight in mixture.items():
        if name not in sources:
            raise UserError(f'the mixture names an unknown source "{name}"{nearest(name, sources)}')
        if not (np.isfinite(weight) and weight >= 0):
            raise UserError(f'the weight of source "{name}" is {weight}; it must be 0 or more')
    if not any(mixture.values()):
        raise UserError("the mixture is empty: no source has a weight above 0")
    if workers < 0:
        raise UserError(f"workers is {workers}; it must be 0 or more")
    if not 0 <= process[0] < process[1]:
        raise UserError(f"process index {process[0]} is not one of {process[1]} processes")


def merge(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of those of several processes; processes with the same rows may give it twice."""
    parts = {state["first"]: state["streams"] for state in states}
    streams = [stream for first in sorted(parts) for stream in parts[first]]
    return {**states[0], "first": 0, "streams": streams}
