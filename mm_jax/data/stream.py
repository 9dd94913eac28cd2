"""Streams of samples: who reads what, in which order, packed into rows, with an exact and small state."""

from __future__ import annotations

import collections
import dataclasses
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mm_jax.data.example import Example
from mm_jax.data.messages import Conversation
from mm_jax.data.packing import BatchConfig, FirstFitPacker, refusal, size_of
from mm_jax.data.sources import Source
from mm_jax.errors import UserError

Key = tuple[str, int]
"""Name of a source, and a place in its endless shuffled order."""
State = dict[str, Any]

_GIVE_UP_AFTER = 1000  # samples of one source in a row that cannot be used


def empty_state() -> State:
    """Of a stream that nothing was read of.

    head: keys [source, place] that are read before the regular ones. next_index: position behind the last sample that
    was read; positions count from the first key of `head`. rows: positions of the samples in the open rows. drops:
    source -> reason -> samples refused. epochs: source -> times gone through.
    """
    return {"head": [], "next_index": 0, "rows": [], "drops": {}, "epochs": {}}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One position of a stream, encoded or refused. id: source and name, for people."""

    position: int
    source: str
    epoch: int
    id: str
    example: Example | None
    reason: str = ""
    message: str = ""


class Order:
    """The endless order of every source, and the mixture of them that a stream sees.

    Args:
        mixture: source name -> weight above 0.
        lengths: source name -> samples.
        seed: of the order within each source.
    """

    def __init__(self, mixture: Mapping[str, float], lengths: Mapping[str, int], seed: int):
        import grain  # costs two seconds that commands without training need not wait

        self._weights = dict(mixture)
        self.lengths = {name: lengths[name] for name in mixture}
        self._parts = {}
        for name in mixture:
            # seeds that differ by one would give two sources of one length the same orders, one epoch apart
            order = zlib.crc32(f"{seed}/{name}".encode())
            part = grain.MapDataset.range(lengths[name]).shuffle(order).repeat()
            self._parts[name] = part.map_with_index(_Record(name))

    def stream(self, index: int, count: int, origin: Mapping[str, int]) -> Any:
        """The endless `grain.MapDataset` of (source, place, record) of one of `count` streams from `origin` on."""
        import grain

        # shared out before mixing: behind it, two equal weights and two streams would give each stream one source
        parts = [part[origin[name] + index :: count] for name, part in self._parts.items()]
        return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, list(self._weights.values()))

    def record(self, key: Key) -> tuple[str, int, int]:
        """(source, place, record) of a key."""
        return self._parts[key[0]][key[1]]


@dataclasses.dataclass(frozen=True)
class _Record:
    source: str

    def __call__(self, place: int, record: int) -> tuple[str, int, int]:
        return self.source, place, int(record)


def share_out(
    order: Order, origin: Mapping[str, int], states: Sequence[State], count: int
) -> tuple[dict, list]:
    """(origin, states) of `count` new streams that go on where streams of other number stand.

    Every sample that these had not trained on is read once, as it would have been.
    """
    left: list[Key] = []
    taken: list[dict[str, int]] = []
    for s, state in enumerate(states):
        regular, head, done = order.stream(s, len(states), origin), state["head"], state["next_index"]
        for position in (position for row in state["rows"] for position in row):
            left.append(tuple(head[position]) if position < len(head) else regular[position - len(head)][:2])
        left += [tuple(key) for key in head[done:]]
        taken.append(dict.fromkeys(order.lengths, 0))
        missing = set(order.lengths)
        for position in range(done - len(head) - 1, -1, -1):
            name, place, _ = regular[position]
            if name in missing:
                missing.remove(name)
                taken[s][name] = (place - origin[name] - s) // len(states) + 1
            if not missing:
                break
    begin = {}
    for name in order.lengths:
        furthest = max(one[name] for one in taken)
        for s, one in enumerate(taken):
            left += [(name, origin[name] + s + k * len(states)) for k in range(one[name], furthest)]
        begin[name] = origin[name] + furthest * len(states)
    fresh = [empty_state() | {"head": [list(key) for key in left[s::count]]} for s in range(count)]
    fresh[0]["drops"] = add_drops(state["drops"] for state in states)
    return begin, fresh


def add_drops(drops: Any) -> dict[str, dict[str, int]]:
    """Sums of counts by source and reason."""
    total: dict[str, dict[str, int]] = {}
    for one in drops:
        for source, reasons in one.items():
            found = total.setdefault(source, {})
            for reason, number in reasons.items():
                found[reason] = found.get(reason, 0) + number
    return total


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Reads and encodes the sample at one position. Never raises, so that no worker ever stops in front of it."""

    sources: dict[str, Source]
    encode: Callable[[Conversation], Example]
    batch: BatchConfig
    first_position: int = 0

    def __call__(self, index: int, record: tuple[str, int, int]) -> Sample:
        name, place, number = record
        position, epoch = self.first_position + index, place // len(self.sources[name])
        identity = f"#{number}"
        try:
            conversation = self.sources[name][number]
            identity = conversation.id or identity
            example = dataclasses.replace(self.encode(conversation), source=name)
            if conversation.rejected is not None:
                example = dataclasses.replace(example, preference=self._first_pair(name) + number)
            refused = refusal(example, self.batch)
        except UserError as error:
            refused = getattr(error, "reason", "bad_sample"), str(error)
        except Exception as error:
            # one odd sample must not end a run of days; the counts and `strict` show it
            refused = f"error_{type(error).__name__}", str(error)
        if refused:
            message = f'sample "{identity}" of source "{name}": {refused[1]}'
            return Sample(position, name, epoch, f"{name}/{identity}", None, refused[0], message)
        return Sample(position, name, epoch, f"{name}/{identity}", example)

    def _first_pair(self, name: str) -> int:
        """Pairs are numbered through all sources."""
        before = list(self.sources).index(name)
        return sum(len(source) for source in list(self.sources.values())[:before])


class Stream:
    """Makes the rows of one stream, from a state on. Only the background thread runs it.

    Args:
        order, origin: see `Order.stream`.
        place: (index, count) of the stream.
        state: where to begin, see `empty_state`.
        encoder: its `first_position` is not looked at.
        readers: processes that read and encode (0 does both in threads), and this stream's share of all that reads.
        strict: raise `UserError` at the first sample that cannot be used.
        messages: the first one for each (source, reason) of a drop is put here.
    """

    def __init__(
        self,
        order: Order,
        place: tuple[int, int],
        origin: Mapping[str, int],
        state: State,
        encoder: Encoder,
        readers: tuple[int, float],
        strict: bool,
        messages: dict[tuple[str, str], str],
    ):
        self._order, self._state, self._encoder = order, state, encoder
        self._head = [tuple(key) for key in state["head"]]
        encode = dataclasses.replace(encoder, first_position=len(self._head))
        self._regular = order.stream(*place, origin).map_with_index(encode)
        # twice through a source without one good sample; small ones are watched longer, because a process sees
        # only its share of them
        self._patience = {name: min(max(2 * n, 64), _GIVE_UP_AFTER) for name, n in order.lengths.items()}
        self._workers, self._share = readers
        self._strict, self.messages = strict, messages

    def rows(self, number: int) -> Iterator[tuple[list[list[Sample]], State]]:
        """Pairs of `number` full rows and the state behind them."""
        state = self._state
        packer = self.open_rows(state["rows"])
        drops, epochs = add_drops([state["drops"]]), dict(state["epochs"])
        failed: collections.Counter = collections.Counter()
        ready: list[list[Sample]] = []
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
                if len(ready) == number:
                    after = self._behind(sample.position + 1, packer)
                    yield ready, after | {"drops": add_drops([drops]), "epochs": dict(epochs)}
                    ready = []
        finally:
            samples.close()

    def _behind(self, next_index: int, packer: FirstFitPacker) -> State:
        rows = [[kept.position for kept in open_row] for open_row in packer.rows]
        head = len(self._head)
        if not any(
            position < head for row in rows for position in [next_index, *row]
        ):  # nothing needs it any more
            return {
                "head": [],
                "next_index": next_index - head,
                "rows": [[p - head for p in row] for row in rows],
            }
        return {"head": [list(key) for key in self._head], "next_index": next_index, "rows": rows}

    def _samples(self, start: int) -> Iterator[Sample]:
        """The stream from a position on, read ahead by threads or worker processes."""
        import grain
        from absl import flags

        # grain asks absl's flags for profiling options, which only a program started by absl.app has parsed
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        for position in range(start, len(self._head)):
            yield self._at(position)
        rest = self._regular[max(start - len(self._head), 0) :]
        if self._workers:
            read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)
            workers = max(1, round(self._workers * self._share))
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=16)
            dataset = rest.to_iter_dataset(read).mp_prefetch(options, _start_worker)
        else:
            threads = max(1, round(min(4, os.cpu_count() or 1) * self._share))
            ahead = max(8, round(64 * self._share))
            read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
            dataset = rest.to_iter_dataset(read)
        iterator = iter(dataset)
        try:
            yield from iterator
        finally:
            iterator.close()

    def _at(self, position: int) -> Sample:
        if position >= len(self._head):
            return self._regular[position - len(self._head)]
        return self._encoder(position, self._order.record(self._head[position]))

    def open_rows(self, rows: list[list[int]]) -> FirstFitPacker:
        """A packer with the open rows of a state; their samples are read again."""
        packer = FirstFitPacker(self._encoder.batch)
        for positions in rows:
            samples = [self._at(position) for position in positions]
            for sample in samples:
                if sample.example is None:
                    raise UserError(f"resuming: a sample that was used before fails now: {sample.message}")
            try:
                packer.open(samples, [size_of(sample.example) for sample in samples])
            except ValueError as error:
                raise UserError(f"resuming: the samples of the saved rows have changed ({error})") from None
        return packer

    def _drop(self, sample: Sample, drops: dict[str, dict[str, int]], failed: collections.Counter) -> None:
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


def _start_worker(index: int, count: int) -> None:
    # Ctrl-C reaches every process of the terminal; only the main process may answer it, after saving
    signal.signal(signal.SIGINT, signal.SIG_IGN)
