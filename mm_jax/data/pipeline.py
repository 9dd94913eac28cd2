"""Training batches: mix -> shuffle -> repeat -> encode -> pack -> batch, with an exact and small state.

Every sample of a run has one number, its position in the stream of the mixture, and what stands there
follows from (mixture, seed, position) alone. Workers read that stream in order, whatever their number;
packing happens behind them, in one place. So the state of the pipeline is the next position and the
positions of the samples in the open rows: an interrupted run fetches those again and goes on with the same
batches, bit for bit, with any number of workers. A sample that cannot be used keeps its position: it is
dropped and counted behind the workers.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import signal
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mm_jax.data.background import Background
from mm_jax.data.example import Example
from mm_jax.data.messages import Conversation
from mm_jax.data.packing import BatchConfig, FirstFitPacker, Layout, collate, refusal, size_of
from mm_jax.data.sources import Source
from mm_jax.errors import UserError, nearest

__all__ = ["BatchConfig", "BatchInfo", "Layout", "TrainData"]

Batch = dict[str, np.ndarray]

PREFETCH_BATCHES = 2
_GIVE_UP_AFTER = 1000  # samples of one source in a row that cannot be used


@dataclasses.dataclass(frozen=True)
class BatchInfo:
    """What a batch holds, for the log. Counts are of this process.

    images, audio: slots in use. padding: share of positions without a token. trainable: tokens with a loss
    weight, by source. drops: samples refused since the start of the stage, by source and reason. epochs: how
    often each source has been gone through.
    """

    examples: int
    tokens: int
    images: int
    audio: int
    padding: float
    trainable: dict[str, int]
    drops: dict[str, dict[str, int]]
    epochs: dict[str, int]


@dataclasses.dataclass(frozen=True)
class _Sample:
    """One position of the stream, encoded or refused."""

    position: int
    source: str
    epoch: int
    example: Example | None
    reason: str = ""
    message: str = ""


class TrainData:
    """An endless iterator of (batch, info), made ahead of time in the background.

    Args:
        sources: the opened sources by name.
        mixture: source name -> weight; of the samples (not tokens) drawn, a source gives its share of the
        weights.
            A weight of 0 leaves a source out.
        batch: shapes and budgets of a batch.
        encode: conversation -> Example, must be picklable for workers > 0, raises `UserError` for a bad
        sample; a
            `reason` on the exception is the key under which the drop is counted.
        layout: shapes of the media slots, see `Layout.of`.
        seed: of the order within each source.
        workers: processes that read and encode; 0 does both in threads. Does not change the batches.
        process: (index, count) of this host among those that train together. Each gets its own samples in
        the same
            mixture.
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
        for name, length in lengths.items():
            if not length:
                raise UserError(f'source "{name}" of the mixture holds no samples')
        self._fingerprint = {
            "mixture": {name: float(weight) for name, weight in drawn.items()},
            "samples": lengths,
            "seed": seed,
            "process": list(process),
            "budget": [batch.length, batch.images, batch.audio, batch.pairs, batch.bins],
        }
        encoder = _Encode({name: sources[name] for name in drawn}, encode, batch)
        self._plan = _Plan(
            _stream(drawn, lengths, seed, process, encoder),
            batch,
            layout,
            self.names,
            lengths,
            workers,
            strict,
        )
        self._state = {"next_index": 0, "rows": [], "drops": {}, "epochs": {}}
        self._background: Background | None = None
        self._finalizer: weakref.finalize | None = None

    def start(self) -> None:
        """Begin to prepare batches; `next()` does it too, this lets it overlap with compiling the model."""
        if self._background is None:
            plan, state = self._plan, self._state
            self._background = Background(lambda: plan.batches(state), PREFETCH_BATCHES)
            # worker processes must be gone before the interpreter takes its modules apart
            self._finalizer = weakref.finalize(self, self._background.close)

    def __iter__(self) -> TrainData:
        return self

    def __next__(self) -> tuple[Batch, BatchInfo]:
        self.start()
        try:
            batch, info, self._state = self._background.get()
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):
                self.close()
            raise
        return batch, info

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the last batch handed out: small, plain JSON."""
        return {**self._state, **self._fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue behind the batch after which `state` was taken; the number of workers may differ.

        Raises `UserError` if the state belongs to another mixture, seed, budget or process count, or if a
        source has another number of samples now.
        """
        for key, value in self._fingerprint.items():
            if key not in state or state[key] != value:
                raise UserError(f"saved data state has {key} {state.get(key)}, this run has {value}")
        self.close()
        self._state = {key: state[key] for key in ("next_index", "rows", "drops", "epochs")}

    @property
    def drops(self) -> dict[str, collections.Counter]:
        """Samples refused up to the last batch handed out: source -> reason -> count."""
        return {name: collections.Counter(reasons) for name, reasons in self._state["drops"].items()}

    @property
    def drop_messages(self) -> dict[tuple[str, str], str]:
        """The first message met for each (source, reason), to show what a count means."""
        return dict(self._plan.messages)

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


def _stream(
    mixture: Mapping[str, float],
    lengths: Mapping[str, int],
    seed: int,
    process: tuple[int, int],
    encode: _Encode,
) -> Any:
    """The endless `grain.MapDataset` of samples of this process."""
    import grain  # costs two seconds that commands without training need not wait

    parts = []
    for name in mixture:
        # seeds that differ by one would give two sources of one length the same orders, one epoch apart
        order = zlib.crc32(f"{seed}/{name}".encode())
        part = grain.MapDataset.range(lengths[name]).shuffle(order).repeat()
        # sharded before mixing: behind it, two equal weights on two hosts would give each host one source
        parts.append(part.map_with_index(_Key(name, lengths[name]))[process[0] :: process[1]])
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, list(mixture.values()))
    return mixed.map_with_index(encode)


@dataclasses.dataclass(frozen=True)
class _Key:
    """Which record of which source stands at a place of its endless order, and in which epoch."""

    source: str
    length: int

    def __call__(self, place: int, record: int) -> tuple[str, int, int]:
        return self.source, place // self.length, int(record)


class _Encode:
    """Reads and encodes the sample at one position. Never raises, so that no worker ever stops in front of
    it."""

    def __init__(
        self, sources: Mapping[str, Source], encode: Callable[[Conversation], Example], batch: BatchConfig
    ):
        self._sources = dict(sources)
        self._encode = encode
        self._batch = batch
        starts = np.cumsum([0, *(len(source) for source in self._sources.values())])
        self._first_pair = dict(zip(self._sources, starts.tolist(), strict=False))

    def __call__(self, position: int, key: tuple[str, int, int]) -> _Sample:
        name, epoch, record = key
        identity = f"#{record}"
        try:
            conversation = self._sources[name][record]
            identity = conversation.id or identity
            example = dataclasses.replace(self._encode(conversation), source=name)
            if conversation.rejected is not None:
                example = dataclasses.replace(example, preference=self._first_pair[name] + record)
            refused = refusal(example, self._batch)
        except UserError as error:
            refused = getattr(error, "reason", "bad_sample"), str(error)
        except Exception as error:
            # one odd sample must not end a run of days; the counts and `strict` show it
            refused = f"error_{type(error).__name__}", str(error)
        if refused:
            message = f'sample "{identity}" of source "{name}": {refused[1]}'
            return _Sample(position, name, epoch, None, refused[0], message)
        return _Sample(position, name, epoch, example)


class _Plan:
    """Makes the batches behind a given state. Only the background thread runs it."""

    def __init__(
        self,
        stream: Any,
        batch: BatchConfig,
        layout: Layout,
        names: tuple[str, ...],
        lengths: Mapping[str, int],
        workers: int,
        strict: bool,
    ):
        self._stream = stream
        self._batch = batch
        self._layout = layout
        self._numbers = {name: number for number, name in enumerate(names)}
        # twice through a source without one good sample; small ones are watched longer, because a host sees
        # only its share of them
        self._patience = {name: min(max(2 * n, 64), _GIVE_UP_AFTER) for name, n in lengths.items()}
        self._workers = workers
        self._strict = strict
        self.messages: dict[tuple[str, str], str] = {}

    def batches(self, state: Mapping[str, Any]) -> Iterator[tuple[Batch, BatchInfo, dict[str, Any]]]:
        """Triples of batch, info and the state behind the batch."""
        packer = self._refill(state["rows"])
        drops = {name: dict(reasons) for name, reasons in state["drops"].items()}
        epochs = dict(state["epochs"])
        failed: collections.Counter = collections.Counter()
        ready: list[list[_Sample]] = []
        samples = self._samples(state["next_index"])
        try:
            for sample in samples:
                epochs[sample.source] = sample.epoch
                if sample.example is None:
                    self._drop(sample, drops, failed)
                    continue
                failed[sample.source] = 0
                row = packer.add(sample, size_of(sample.example))
                if row is None:
                    continue
                ready.append(row)
                # one sample finishes at most one row, so no finished row is ever left over in a state
                if len(ready) == self._batch.rows * self._batch.accumulate:
                    rows = [[kept.position for kept in open_row] for open_row in packer.rows]
                    after = {"next_index": sample.position + 1, "rows": rows}
                    after |= {"drops": _copy(drops), "epochs": dict(epochs)}
                    yield *self._collate(ready, after), after
                    ready = []
        finally:
            samples.close()

    def _samples(self, start: int) -> Iterator[_Sample]:
        """The stream from a position on, read ahead by threads or worker processes."""
        import grain
        from absl import flags

        # grain asks absl's flags for profiling options, which only a program started by absl.app has parsed
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        if self._workers:
            read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=16)
            dataset = self._stream[start:].to_iter_dataset(read).mp_prefetch(options, _start_worker)
        else:
            threads = min(4, os.cpu_count() or 1)
            read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=64)
            dataset = self._stream[start:].to_iter_dataset(read)
        iterator = iter(dataset)
        try:
            yield from iterator
        finally:
            iterator.close()

    def _refill(self, rows: list[list[int]]) -> FirstFitPacker:
        """A packer with the open rows of a state; their samples are read again."""
        packer = FirstFitPacker(self._batch)
        for positions in rows:
            samples = [self._stream[position] for position in positions]
            for sample in samples:
                if sample.example is None:
                    raise UserError(f"resuming: a sample that was used before fails now: {sample.message}")
            try:
                packer.open(samples, [size_of(sample.example) for sample in samples])
            except ValueError as error:
                raise UserError(f"resuming: the samples of the saved rows have changed ({error})") from None
        return packer

    def _drop(self, sample: _Sample, drops: dict[str, dict[str, int]], failed: collections.Counter) -> None:
        if self._strict:
            raise UserError(f"{sample.message} ({sample.reason}; strict)")
        reasons = drops.setdefault(sample.source, {})
        reasons[sample.reason] = reasons.get(sample.reason, 0) + 1
        self.messages.setdefault((sample.source, sample.reason), sample.message)
        failed[sample.source] += 1
        if failed[sample.source] >= self._patience[sample.source]:
            commonest = max(reasons, key=reasons.get)
            message = self.messages.get((sample.source, commonest), sample.message)
            raise UserError(
                f'source "{sample.source}": none of {failed[sample.source]} samples in a row could be used; '
                f"mostly {commonest}: {message}"
            )

    def _collate(self, rows: list[list[_Sample]], after: Mapping[str, Any]) -> tuple[Batch, BatchInfo]:
        examples = [[sample.example for sample in row] for row in rows]
        arrays = collate(examples, self._batch, self._layout, self._numbers)
        flat = [example for row in examples for example in row]
        trainable = dict.fromkeys(self._numbers, 0)
        for example in flat:
            trainable[example.source] += int(np.count_nonzero(example.loss_weights))
        tokens = sum(len(example.tokens) for example in flat)
        info = BatchInfo(
            examples=len(flat),
            tokens=tokens,
            images=sum(example.num_images for example in flat),
            audio=sum(example.num_audio for example in flat),
            padding=1 - tokens / (len(rows) * self._batch.length),
            trainable=trainable,
            drops=after["drops"],
            epochs=after["epochs"],
        )
        return arrays, info


def _copy(drops: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    return {name: dict(reasons) for name, reasons in drops.items()}


def _start_worker(index: int, count: int) -> None:
    # Ctrl-C reaches every process of the terminal; only the main process may answer it, after saving
    signal.signal(signal.SIGINT, signal.SIG_IGN)
