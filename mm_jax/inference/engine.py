"""Continuous batching: requests join and leave a batch of fixed size between decoding steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from mm_jax.errors import UserError
from mm_jax.inference.batch import count_bucket, length_bucket
from mm_jax.inference.features import FeaturePool
from mm_jax.inference.programs import Programs, Reading, Said, State
from mm_jax.inference.prompt import Medium, Prompt
from mm_jax.inference.request import Answer, Guide, Logprob, Request
from mm_jax.inference.sampling import Controls, Sampling, mask_words

WORTH_COPYING = 16  # tokens; a shorter beginning that another row has read is read again
POWERS = tuple(1 << k for k in range(4, 14))
LEAST = 256  # tokens that a row of the cache has room for
READ_TOGETHER = 16_384  # tokens of several prompts that are read in one call at most


@dataclass(eq=False)
class _Slot:
    """A row of the batch. keys: what its cache holds, see `Prompt.keys`; used: when it was last given out."""

    row: int
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    answer: Answer | None = None
    used: int = 0

    @property
    def reading(self) -> bool:
        return self.answer is not None and len(self.keys) < self.answer.request.prompt.length

    @property
    def talking(self) -> bool:
        return self.answer is not None and not self.reading


class Engine:
    """Answers many requests at once over a KV cache of `slots` rows.

    `submit` queues a request and `step` moves all of them on: free rows are given to waiting requests, one group of
    prompts is read (a long one in several steps), and every answer under way grows. What a request is answered does
    not depend on the others in the batch. A row that is free again keeps what it has read, so that the next turn of a
    conversation, or another question with the same beginning, reads only what is new.

    Args:
      slots: answers under way at the same time.
      max_length: most tokens of prompt and answer together.
      steps: tokens that answers grow by in one `step` at most; more than 1 for throughput.
      chunk: tokens of one prompt that are read at a time.
      pieces: how many prompts may be read together, in rising order; by default powers of four up to all rows.
      lengths: to which (pieces of) prompts are padded. Every one of `pieces` with every one of `lengths` is a program.
      cache_length: room that the cache has from the start; it grows (and programs are compiled) when it is too small.
      features: media features that are kept.

    Not safe to be called from several threads.
    """

    def __init__(
        self,
        programs: Programs,
        *,
        slots: int = 8,
        max_length: int = 1024,
        steps: int = 16,
        chunk: int = 512,
        pieces: Sequence[int] = (),
        lengths: Sequence[int] = POWERS,
        cache_length: int = 0,
        features: int = 4096,
    ):
        self._programs, self.max_length, self._steps = programs, max_length, steps
        self._pieces = tuple(pieces) or (*(4**k for k in range(slots.bit_length()) if 4**k < slots), slots)
        self._lengths = tuple(length for length in lengths if length <= length_bucket(min(chunk, max_length)))
        self._chunk = min(chunk, self._lengths[-1])
        self._cache_length = length_bucket(self._room(cache_length) if cache_length else 0)
        self._images = (
            0  # pictures that a row of the cache has room for, where they have a place of their own
        )
        config = programs.model.config
        encoders = config.vision is not None or config.audio is not None
        self.pool = FeaturePool(programs, features if encoders else 0)
        self._slots = [_Slot(row) for row in range(slots)]
        self._waiting: deque[Answer] = deque()
        self._state: State | None = None
        self._controls: Controls | None = None
        self._clock = 0
        words = mask_words(programs.vocab_size)
        ones = np.full((max(slots, *self._pieces), words), 2**32 - 1, np.uint32)
        # on the device once: most requests have no guide
        self._all_allowed = {n: jax.device_put(ones[:n]) for n in {slots, *self._pieces}}

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows in use."""
        return sum(slot.answer is not None for slot in self._slots)

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or self.running > 0

    def check_length(self, prompt: int, new: int) -> None:
        """Raises UserError when a prompt and its answer do not fit `max_length`."""
        if new < 1:
            raise UserError(f"max_new_tokens is {new}; at least 1 is needed")
        if prompt + new > self.max_length:
            raise UserError(
                f"the prompt has {prompt} tokens and {new} may follow: over the limit of {self.max_length}; "
                "shorten the question, use fewer pictures or clips, or lower max_new_tokens"
            )

    def check(self, request: Request) -> None:
        """Raises UserError when a request is too long, or biases a token that there is not."""
        self.check_length(request.prompt.length, request.max_new_tokens)
        vocab = self._programs.vocab_size
        for token in request.sampling.logit_bias:
            if not 0 <= token < vocab:
                raise UserError(f"logit_bias names token {token}; the vocabulary has 0 to {vocab - 1}")

    def submit(self, request: Request) -> Answer:
        """Queue a request. Raises UserError as `check` does."""
        self.check(request)
        answer = Answer(request)
        self._waiting.append(answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        """End an answer where it is; its row is free at once."""
        if not answer.finish:
            self._finish(answer, "cancelled")

    def step(self) -> list[Answer]:
        """Move on; the answers that have grown or ended."""
        if self._state is None:
            for slot in self._slots:
                slot.keys = slot.keys[:0]
                if slot.answer is not None and slot.answer.tokens:
                    self.cancel(slot.answer)  # what it has said went with an interrupted call
        self._admit()
        read = self._read()
        return list(dict.fromkeys([*read, *self._decode()]))  # an answer may begin and go on in one step

    def run(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Answers in the order in which they end; requests are taken as rows become free."""
        source = iter(requests)
        exhausted = False
        while True:
            while not exhausted and len(self._waiting) < len(self._slots):
                request = next(source, None)
                exhausted = request is None
                if request is not None:
                    self.submit(request)
            if not self.busy:
                return
            yield from (answer for answer in self.step() if answer.finish)

    def reset(self) -> None:
        """Cancel everything and forget what the cache holds."""
        for answer in [*self._waiting, *(slot.answer for slot in self._slots if slot.answer)]:
            self.cancel(answer)
        self._state = None

    def warm_up(self, media: Iterable[Medium] = ()) -> None:
        """Compile every program that requests up to `cache_length` may need, media like the given ones included."""
        media = list(media)
        pictures = any("pixel_values" in medium.arrays for medium in media)
        self._grow(max(self._cache_length, self._lengths[-1]), int(pictures))
        # a piece of a prompt may begin and end within a picture; those in between have no less than half of their
        # features in it
        self.pool.reserve(
            2 * max((medium.features for medium in media), default=0) + 2 * self._chunk * bool(media)
        )
        self.pool.warm_up(media)
        for pieces in self._pieces:
            controls = Controls.of([Sampling()] * pieces)
            for size in self._lengths:
                nothing = self._empty(pieces, size)
                for length in {size, self._cache_length}:
                    self._prefill(nothing, controls, self._all_allowed[pieces], length)
        idle = np.zeros(len(self._slots), bool)
        for length in self._reaches():
            for steps in {1, self._steps}:
                self._advance(length, steps, idle)
        zero = np.int32(0)
        self._run(self._programs.copy, zero, zero, zero)
        vocab = self._programs.vocab_size
        self._run(self._programs.equip, zero, np.zeros(vocab, bool), np.zeros(vocab, np.float32))

    # what follows is in the order of a request's life

    def _admit(self) -> None:
        """Give free rows to waiting requests, first come first served."""
        later: deque[Answer] = deque()
        while self._waiting and self.running < len(self._slots):
            answer = self._waiting.popleft()
            if self._worth_waiting(answer):
                later.append(answer)
                continue
            request = answer.request
            first = self._padded(min(request.prompt.length, self._chunk))
            needed = max(first, request.prompt.length + request.max_new_tokens, LEAST)
            # by doubling, as every length is another set of programs
            longest = min(1 << (needed - 1).bit_length(), length_bucket(self.max_length))
            longest = length_bucket(self._room(longest))
            self._grow(longest, len(request.prompt.media))
            slot = self._choose(answer)
            self._clock += 1
            slot.answer, slot.used = answer, self._clock
            answer.reused = len(slot.keys)
            self._equip(slot)
            self._controls = None
        self._waiting.extendleft(reversed(later))

    def _worth_waiting(self, answer: Answer) -> bool:
        """Whether a prompt that is being read begins in the same way, further than it has been read."""
        keys = answer.request.prompt.keys
        for slot in self._slots:
            if slot.reading and self._programs.rewinds:
                common = _common(keys[:-1], slot.answer.request.prompt.keys)
                if common > max(len(slot.keys), 2 * WORTH_COPYING):
                    return True
        return False

    def _choose(self, answer: Answer) -> _Slot:
        """A free row whose cache holds as much as possible of the prompt, copied from another row if need be."""
        # the last token is read in any case, to choose what comes after it
        keys = answer.request.prompt.keys[:-1]
        oldest = min((slot for slot in self._slots if slot.answer is None), key=lambda slot: slot.used)
        best = max(self._slots, key=lambda slot: (self._known(keys, slot), slot.answer is None))
        common = self._known(keys, best)
        # in use, or a longer conversation that may go on
        kept = best is not oldest and (best.answer is not None or 2 * common < len(best.keys))
        if kept and common >= WORTH_COPYING:
            source, target = np.int32(best.row), np.int32(oldest.row)
            self._run(self._programs.copy, source, target, np.int32(common))
            best = oldest
        elif kept:
            best, common = oldest, self._known(keys, oldest)
        best.keys = keys[:common]
        return best

    def _known(self, keys: np.ndarray, slot: _Slot) -> int:
        """How many of the first keys the cache of a row has read; 0 where it has read others behind them which it
        cannot forget."""
        common = _common(keys, slot.keys)
        return common if self._programs.rewinds or common == len(slot.keys) else 0

    def _room(self, tokens: int) -> int:
        """Slots for so many tokens, and for the padding behind the last piece of a prompt, where that cannot be moved
        to the front of tokens which are read again."""
        return tokens if self._programs.rewinds else tokens + self._lengths[-1]

    def _equip(self, slot: _Slot) -> None:
        """The tables of the few requests that need them."""
        request = slot.answer.request
        if request.sampling.repetition_penalty == 1 and not request.sampling.logit_bias:
            return
        vocab = self._programs.vocab_size
        prompted, bias = np.zeros(vocab, bool), np.zeros(vocab, np.float32)
        prompted[request.prompt.tokens[request.prompt.tokens < vocab]] = True
        for token, value in request.sampling.logit_bias.items():
            bias[token] = value
        self._run(self._programs.equip, np.int32(slot.row), prompted, bias)

    def _read(self) -> list[Answer]:
        """Read a piece of the prompt that has waited longest, and of others whose pieces are no longer."""
        pending = sorted((slot for slot in self._slots if slot.reading), key=lambda slot: slot.used)
        if not pending:
            return []
        size = self._padded(self._left(pending[0]))
        most = min(self._pieces[-1], max(1, READ_TOGETHER // size))
        group = [slot for slot in pending if self._left(slot) <= size][:most]
        pieces = []
        for slot in group:
            # a piece is written with its padding: near the end of the cache some tokens are read again
            start = min(len(slot.keys), self._cache_length - size)
            pieces.append(slice(start, min(start + size, len(slot.keys) + self._left(slot))))
        if self.pool.capacity:
            prompts = [slot.answer.request.prompt for slot in group]
            needed = [_media_of(prompt, piece) for prompt, piece in zip(prompts, pieces, strict=True)]
            placed = self.pool.place(needed)
        else:
            placed = [{}] * len(group)
        group = group[: len(placed)]
        count = next((n for n in self._pieces if n >= len(group)), self._pieces[-1])
        reading = self._empty(count, size)
        for k, (slot, piece, firsts) in enumerate(zip(group, pieces, placed, strict=False)):
            _fill(reading, k, slot, piece, firsts)
        settings = [slot.answer.request for slot in group]
        fill = [Sampling()] * (count - len(group))
        guided = [reading.final[k] and request.guide is not None for k, request in enumerate(settings)]
        controls = Controls.of(
            [request.sampling for request in settings] + fill,
            guided + [False] * len(fill),
            [request.logprobs for request in settings] + [False] * len(fill),
        )
        allowed = self._allowed(count, [(k, settings[k].guide) for k in np.flatnonzero(guided)])
        fresh = not reading.starts.any()
        said, hidden = self._prefill(reading, controls, allowed, size if fresh else self._cache_length)
        for slot, piece in zip(group, pieces, strict=False):
            slot.keys = slot.answer.request.prompt.keys[: piece.stop]
        ended = [(slot, k) for k, slot in enumerate(group) if slot.talking]
        talking = [(slot, k) for slot, k in ended if not slot.answer.request.embed]
        return self._embedded([pair for pair in ended if pair not in talking], hidden) + self._take(
            talking, said
        )

    def _empty(self, pieces: int, size: int) -> Reading:
        programs = self._programs
        rows = len(self._slots)
        options = programs.position_axes, programs.taps, programs.two_way, self._images, programs.shares
        return Reading.empty(pieces, size, rows, *options)

    def _left(self, slot: _Slot) -> int:
        """Tokens of the next piece of a prompt."""
        return min(slot.answer.request.prompt.length - len(slot.keys), self._chunk)

    def _padded(self, piece: int) -> int:
        return next(length for length in self._lengths if length >= piece)

    def _decode(self) -> list[Answer]:
        talking = [slot for slot in self._slots if slot.talking]
        if not talking:
            return []
        guided = [
            (slot.row, slot.answer.request.guide) for slot in talking if slot.answer.request.guide is not None
        ]
        steps = 1 if guided else self._steps
        if self._controls is None:
            requests = [None if slot.answer is None else slot.answer.request for slot in self._slots]
            controls = Controls.of(
                [request.sampling if request else Sampling() for request in requests],
                [request is not None and request.guide is not None for request in requests],
                [request is not None and request.logprobs for request in requests],
            )
            self._controls = jax.device_put(controls)
        active = np.zeros(len(self._slots), bool)
        active[[slot.row for slot in talking]] = True
        reach = max(len(slot.keys) for slot in talking) + steps
        length = next(n for n in self._reaches() if n >= min(reach, self._reaches()[-1]))
        said = self._advance(length, steps, active, self._allowed(len(self._slots), guided))
        return self._take([(slot, slot.row) for slot in talking], said)

    def _embedded(self, rows: list[tuple[_Slot, int]], hidden: jax.Array) -> list[Answer]:
        """End the answers that are no text; (slot, row of `hidden`)."""
        answers = [slot.answer for slot, _ in rows]
        found = np.asarray(hidden) if rows else ()
        for answer, (_, row) in zip(answers, rows, strict=True):
            answer.hidden = found[row]
            self._finish(answer, "stop")
        return answers

    def _take(self, rows: list[tuple[_Slot, int]], said: Said) -> list[Answer]:
        """Hand the tokens of a program to their answers; (slot, row of `said`)."""
        if not rows:
            return []
        said = jax.device_get(said)
        changed = []
        for slot, row in rows:
            answer = slot.answer
            count = int(said.count[row])
            tokens = said.tokens[row, :count]
            # every token but the newest has been read by the decoder
            read = np.array([*answer.tokens[-1:], *tokens[:-1]], np.int64)
            slot.keys = np.concatenate([slot.keys, read])
            for step in range(count):
                if not answer.finish:
                    self._say(answer, said, row, step)
            changed.append(answer)
        return changed

    def _say(self, answer: Answer, said: Said, row: int, step: int) -> None:
        request, token = answer.request, int(said.tokens[row, step])
        answer.tokens.append(token)
        if request.logprobs:
            pairs = zip(said.top_tokens[row, step], said.top_logprobs[row, step], strict=True)
            top = tuple((int(i), float(value)) for i, value in pairs)
            answer.logprobs.append(Logprob(float(said.logprobs[row, step]), top))
        over = request.guide is not None and request.guide.accept(token)
        over |= request.watch is not None and request.watch(token)
        if over or (token in self._programs.stop_ids and not request.ignore_eos):
            self._finish(answer, "stop")
        elif len(answer.tokens) == request.max_new_tokens:
            self._finish(answer, "length")

    def _finish(self, answer: Answer, reason: str) -> None:
        answer.finish = reason
        if answer in self._waiting:
            self._waiting.remove(answer)
        for slot in self._slots:
            if slot.answer is answer:
                slot.answer = None
                self._controls = None

    # calls of programs: the state is given up to each and comes back from it

    def _run(self, program: Callable, *arguments: object) -> None:
        state, self._state = self._state, None  # an interrupt must not leave us one that is gone
        self._state = program(state, *arguments)

    def _prefill(
        self, reading: Reading, controls: Controls, allowed: jax.Array, length: int
    ) -> tuple[Said, jax.Array]:
        state, self._state = self._state, None
        if self.pool.array is None:
            self.pool.place([[]])
        programs = self._programs
        self._state, said, hidden = programs.prefill(
            programs.params, state, self.pool.array, reading, controls, allowed, length=length
        )
        return said, hidden

    def _advance(self, length: int, steps: int, active: np.ndarray, allowed: jax.Array | None = None) -> Said:
        if self._controls is None:
            self._controls = jax.device_put(Controls.of([Sampling()] * len(self._slots)))
        allowed = self._all_allowed[len(self._slots)] if allowed is None else allowed
        state, self._state = self._state, None
        programs = self._programs
        self._state, said = programs.decode(
            programs.params, state, self._controls, allowed, active, length=length, steps=steps
        )
        return said

    def _allowed(self, rows: int, guided: Sequence[tuple[int, Guide]]) -> jax.Array | np.ndarray:
        if not guided:
            return self._all_allowed[rows]
        allowed = np.full(self._all_allowed[rows].shape, 2**32 - 1, np.uint32)
        for row, guide in guided:
            allowed[row] = guide.mask()
        return allowed

    def _grow(self, length: int, images: int = 0) -> None:
        """Make sure that the cache has `length` slots a row, and room for pictures where those have their own."""
        before = self._cache_length, self._images
        self._cache_length = max(self._cache_length, length)
        if self._programs.shares:
            self._images = max(self._images, count_bucket(images))
        sizes = {"length": self._cache_length, "images": self._images}
        if self._state is None:
            self._state = self._programs.bound(self._programs.start(rows=len(self._slots), **sizes))
        elif (self._cache_length, self._images) != before:
            state, self._state = self._state, None
            self._state = self._programs.grow(state, **sizes)

    def _reaches(self) -> tuple[int, ...]:
        """How far back decoding may look: short answers need not wait for an almost empty cache."""
        shorter = (length for length in (256, 1024, 4096, 16384) if 2 * length <= self._cache_length)
        return (*shorter, self._cache_length)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many keys from the start are the same."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _media_of(prompt: Prompt, piece: slice) -> list[Medium]:
    """The media that a piece of a prompt takes features of; all where layers of their own read them."""
    if prompt.seen is not None:
        return list(prompt.media)
    index = prompt.media_index[piece]
    used = np.unique(np.searchsorted(prompt.firsts, index[index >= 0], side="right") - 1)
    return [prompt.media[k] for k in used]


def _fill(reading: Reading, k: int, slot: _Slot, piece: slice, firsts: dict[bytes, int]) -> None:
    """Write a piece of a slot's prompt into place k."""
    request = slot.answer.request
    prompt, count = request.prompt, piece.stop - piece.start
    reading.tokens[k, :count] = prompt.tokens[piece]
    reading.segment_ids[k, :count] = 1
    positions = prompt.positions[piece]
    wide = reading.positions.ndim > positions.ndim + 1  # text alone: the same along all axes
    reading.positions[k, :count] = positions[:, None] if wide else positions
    reading.following[k] = prompt.next_position
    index = prompt.media_index[piece]
    reading.media_index[k, :count] = np.minimum(index, -1)  # text and markers
    for medium, first in zip(prompt.media, prompt.firsts, strict=False):
        here = (index >= first) & (index < first + medium.features)
        if here.any():
            reading.media_index[k, :count][here] = index[here] - first + firsts[medium.digest]
    if reading.blocks is not None and prompt.blocks is not None:
        reading.blocks[k, :count] = prompt.blocks[piece]
    if prompt.seen is not None:
        reading.seen[k, :count, : prompt.seen.shape[1]] = prompt.seen[piece]
        reading.slot_firsts[k, : len(prompt.media)] = [firsts[medium.digest] for medium in prompt.media]
    if reading.media_taps is not None:
        reading.tap_weights[k, :, 0] = 1
        if prompt.taps is not None:
            reading.media_taps[k, :count], reading.tap_weights[k, :count] = (x[piece] for x in prompt.taps)
    reading.rows[k], reading.starts[k], reading.counts[k] = slot.row, piece.start, count
    reading.final[k] = piece.stop == prompt.length
    reading.left[k], reading.ends[k] = request.max_new_tokens, not request.ignore_eos
