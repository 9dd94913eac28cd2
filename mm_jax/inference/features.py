"""The encoders' outputs, made once for each distinct picture or clip."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import numpy as np

from mm_jax.inference.programs import Programs
from mm_jax.inference.prompt import Medium

SMALL = 256  # features of a medium of several slots, such as the patches of a picture, that is encoded with others


def together(medium: Medium) -> tuple[int, ...]:
    """How many media of this kind are encoded in one call, the most first. Each number is a program for each kind, and
    there is one kind where media have one slot, but many where they have as many as they need."""
    if len(next(iter(medium.arrays.values()))) == 1:
        return 8, 4, 2, 1
    return (4, 1) if medium.features <= SMALL else (1,)


class FeaturePool:
    """Features on the device in one array that prompts gather from, found again by the content of the medium.

    New features go behind the newest ones, round and round, and take the place of the oldest.

    Attributes:
      capacity: features that there is room for; 0: a model without encoders.
      encoded: media that went through an encoder so far.
    """

    def __init__(self, programs: Programs, capacity: int):
        self._programs, self.capacity = programs, capacity
        self.encoded = 0
        self.array: jax.Array | None = None
        self._first: dict[bytes, int] = {}
        self._media: dict[bytes, Medium] = {}
        self._next = 0

    def place(self, groups: Iterable[Iterable[Medium]]) -> list[dict[bytes, int]]:
        """Encodes what is not there yet.

        Args:
          groups: of media that are needed together, the most urgent first.

        Returns:
          For as many groups as there is room for at the same time, at least one: where the features of each medium
          begin, by digest.
        """
        if self.array is None:
            self._start(self.capacity)
        placed: list[dict[bytes, int]] = []
        new: list[tuple[Medium, int]] = []
        kept: set[bytes] = set()
        for group in groups:
            media = {medium.digest: medium for medium in group}
            total = sum(medium.features for medium in media.values())
            if not placed and total > self.capacity:
                self._start(1 << (total - 1).bit_length())
            kept_here = kept | media.keys()
            fresh: list[tuple[Medium, int]] = []
            for digest, medium in media.items():
                if digest in self._first:
                    continue
                first = self._room(medium.features, kept_here)
                if first is None:
                    break
                self._first[digest], self._media[digest] = first, medium
                fresh.append((medium, first))
            else:
                kept = kept_here
                new += fresh
                placed.append({digest: self._first[digest] for digest in media})
                continue
            for medium, _ in fresh:  # they were given a place, but nothing will be written there
                del self._first[medium.digest], self._media[medium.digest]
            if placed:
                break
            # alone it fits, so what is in the way is only its own older part
            self._start(self.capacity)
            return self.place([media.values()])
        self._encode(new)
        return placed

    def _start(self, capacity: int) -> None:
        self.capacity = capacity
        self.array = self._programs.bound(self._programs.pool(capacity=capacity))
        self._first, self._media, self._next = {}, {}, 0

    def _room(self, size: int, kept: set[bytes]) -> int | None:
        """Where `size` features can go without touching those that are kept; what was there is forgotten."""
        first, turned = self._next, False
        while True:
            if first + size > self.capacity:
                if turned:
                    return None
                first, turned = 0, True
            inside = [
                digest
                for digest, other in self._first.items()
                if other < first + size and first < other + self._media[digest].features
            ]
            blocking = [digest for digest in inside if digest in kept]
            if not blocking:
                for digest in inside:
                    del self._first[digest], self._media[digest]
                self._next = first + size
                return first
            first = max(self._first[digest] + self._media[digest].features for digest in blocking)

    def _encode(self, new: list[tuple[Medium, int]]) -> None:
        """Runs of one kind whose places follow each other, in few sizes."""
        while new:
            medium, first = new[0]
            run, counts = 1, together(medium)
            while (
                run < len(new)
                and run < counts[0]
                and new[run][0].kind == medium.kind
                and new[run][1] == first + run * medium.features
            ):
                run += 1
            count = next(n for n in counts if n <= run)
            self._run([medium for medium, _ in new[:count]], first)
            new = new[count:]

    def _run(self, media: list[Medium], first: int) -> None:
        arrays = {name: np.stack([m.arrays[name] for m in media]) for name in media[0].arrays}
        pool, self.array = self.array, None  # given up: an interrupt must not leave us half of it
        self.array = self._programs.encode(self._programs.params, pool, arrays, np.int32(first))
        self.encoded += len(media)

    def reserve(self, features: int) -> None:
        """Make room for so many; what was there is forgotten where that is more than before."""
        if features > self.capacity:
            self._start(features)

    def warm_up(self, media: Iterable[Medium]) -> None:
        """Compiles the encoders for media of these kinds."""
        for medium in media:
            self._start(self.capacity)
            for count in together(medium):
                if count * medium.features <= self.capacity:
                    self._run([medium] * count, 0)
        self._start(self.capacity)
        self.encoded = 0
