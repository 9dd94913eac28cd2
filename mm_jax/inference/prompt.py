"""What the engine reads: the tokens of one conversation, and its media one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from mm_jax.data.packing import Layout, blocks_of
from mm_jax.inference.batch import span_bucket

if TYPE_CHECKING:
    from mm_jax.data.example import Example


@dataclass(frozen=True)
class Medium:
    """One picture, frame of a video, or window of sound, as the encoder takes it.

    Attributes:
      arrays: the encoder's inputs as of one row of a batch, under their names: [slots, ...].
      features: pseudo-tokens that come out.
    """

    arrays: Mapping[str, np.ndarray]
    features: int

    @property
    def kind(self) -> tuple:
        """Media of one kind can be encoded together: the same names and shapes."""
        arrays = sorted(self.arrays.items())
        return (self.features, *((name, array.shape, str(array.dtype)) for name, array in arrays))

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for the content."""
        found = hashlib.blake2b(repr(self.kind).encode(), digest_size=16)
        for _, array in sorted(self.arrays.items()):
            found.update(np.ascontiguousarray(array).tobytes())
        return found.digest()


@dataclass(frozen=True)
class Prompt:
    """One conversation up to the answer (T tokens, F features).

    Attributes:
      tokens: int32 [T].
      positions: int32 [T], or [T, 3] for M-RoPE.
      media_index: int32 [T], which of the features of `media`, one medium after the other, a token takes; -1 for text,
        -2 - k for the model's k-th learned marker.
      taps: int32 and float32 [T, TAPS], where tokens take mixtures of features; see `mm_jax.data.example`.
      blocks: int32 [T], tokens with the same number above 0 see each other whatever their order.
      seen: int8 [T, media * shares], for decoders that read features in layers of their own, see
        `mm_jax.data.example`; None without media.
    """

    tokens: np.ndarray
    positions: np.ndarray
    media_index: np.ndarray
    media: tuple[Medium, ...] = ()
    taps: tuple[np.ndarray, np.ndarray] | None = None
    blocks: np.ndarray | None = None
    seen: np.ndarray | None = None

    @property
    def next_position(self) -> int:
        """Of the answer's first token: behind all others, as those of media may be further than the last one."""
        return int(self.positions.max(initial=-1)) + 1

    @property
    def length(self) -> int:
        return len(self.tokens)

    @cached_property
    def firsts(self) -> np.ndarray:
        """int [media + 1]: where the features of each medium begin, and their number."""
        return np.cumsum([0, *(medium.features for medium in self.media)])

    @cached_property
    def keys(self) -> np.ndarray:
        """int64 [T]: equal where tokens are equal, those of media where also what they show is.

        Two pictures have the same placeholder tokens, and a cache that has read one must not answer for the other.
        """
        # a marker has the token of a feature
        keys = self.tokens + (np.maximum(-1 - self.media_index, 0).astype(np.int64) << 32)
        for medium, first in zip(self.media, self.firsts, strict=False):
            offset = self.media_index - first
            here = (offset >= 0) & (offset < medium.features)
            # 63 bits of the content and the feature, negative: no token is
            content = int.from_bytes(medium.digest[:8], "little") >> 1
            with np.errstate(over="ignore"):
                mixed = np.int64(content) ^ (offset.astype(np.int64) * np.int64(0x9E3779B97F4A7C1))
            keys = np.where(here, mixed | np.int64(-(2**63)), keys)
        for block in () if self.blocks is None else np.unique(self.blocks[self.blocks > 0]):
            here = self.blocks == block  # what is read of one of them depends on all
            content = hashlib.blake2b(keys[here].tobytes(), digest_size=8).digest()
            keys[here] ^= np.int64(int.from_bytes(content, "little") >> 1)
        if self.seen is not None:  # what is read of a token depends on everything that it attends to
            content = b"".join(medium.digest for medium in self.media)
            kinds, kind = np.unique(self.seen, axis=0, return_inverse=True)
            mixed = [hashlib.blake2b(row.tobytes() + content, digest_size=8).digest() for row in kinds]
            keys = keys ^ np.array([int.from_bytes(digest, "little") >> 1 for digest in mixed])[kind.ravel()]
        return keys


def prompt_of(example: Example, layout: Layout) -> Prompt:
    """The prompt of an example."""
    base = layout.image_features(example.num_images)  # sound comes behind the pictures
    index = np.where(example.audio_index >= 0, example.audio_index + base, example.image_index)
    arrays = {"audio_values": example.audio_values, "audio_frames": example.audio_frames}
    media = example.image_arrays | arrays
    prompt = _prompt(example.tokens, example.positions, index, media, layout, example.seen, example.taps)
    blocks = None
    if layout.two_way != "none":
        text = {
            "segment_ids": example.segments[None],
            "positions": example.positions[None],
            "loss_weights": example.loss_weights[None],
            "media_index": prompt.media_index[None],
        }
        blocks = blocks_of(layout.two_way, text)[0]
    return replace(prompt, blocks=blocks)


def prompts_of(batch: Mapping[str, np.ndarray], layout: Layout) -> list[Prompt]:
    """The rows of a batch of one conversation a row, padded on either side."""
    batch = {name: np.asarray(array) for name, array in batch.items()}
    found = []
    for row in range(len(batch["tokens"])):
        arrays = {name: array[row] for name, array in batch.items()}
        real = arrays["segment_ids"] > 0
        text = (arrays[name][real] for name in ("tokens", "positions", "media_index"))
        taps = None
        if "media_taps" in arrays:
            taps = arrays["media_taps"][real], arrays["tap_weights"][real]
        prompt = _prompt(*text, arrays, layout, arrays["seen"][real] if "seen" in arrays else None, taps)
        if "blocks" in arrays:
            prompt = replace(prompt, blocks=arrays["blocks"][real])
        found.append(prompt)
    return found


def text_prompt(ids: Sequence[int]) -> Prompt:
    """Token ids without media."""
    tokens = np.asarray(ids, np.int32)
    return Prompt(tokens, np.arange(len(tokens), dtype=np.int32), np.full(len(tokens), -1, np.int32))


def _prompt(
    tokens: np.ndarray,
    positions: np.ndarray,
    index: np.ndarray,
    arrays: Mapping[str, np.ndarray],
    layout: Layout,
    seen: np.ndarray | None = None,
    taps: tuple[np.ndarray, np.ndarray] | None = None,
) -> Prompt:
    """One conversation with its media taken apart; those that no token takes a feature of, or sees, are left out.

    Args:
      index: int [T], media_index as in a batch.
      arrays: of the media of one row, as in a batch.
      seen: int8 [T, slots * shares], as in a batch.
      taps: see `Prompt`.
    """
    media: list[Medium] = []
    moved, taken = np.where(index < 0, index, -1), 0

    def add(
        first: int, last: int, features: int, make: Callable[[], dict[str, np.ndarray]], read: bool = False
    ) -> None:
        nonlocal taken
        here = (index >= first) & (index < last)
        if here.any() or read:
            moved[here] = index[here] - first + taken
            media.append(Medium(make(), features))
            taken += features

    kept: list[np.ndarray] = []
    images = {name: arrays[name] for name, _, _ in layout.image_arrays if name in arrays}
    count = min((len(array) for array in images.values()), default=0)
    if not count:
        spans = ()
    elif taps is not None:
        spans = _mixed(
            np.where(index < layout.image_features(count), index, -1), taps, layout.image_tokens, count
        )
    else:
        spans = _pictures(images, layout)
    for start, end in spans:
        slots = span_bucket(end - start, layout)
        first, last = layout.image_features(start), layout.image_features(end)
        shares = None if seen is None else seen[:, start * layout.shares : end * layout.shares]
        read = shares is not None and bool(shares.any())
        if read:
            kept.append(shares)
        add(first, last, layout.image_features(slots), partial(_slots, images, start, end, slots), read)
    base = layout.image_features(count)
    for k in range(len(arrays.get("audio_values", ()))):
        first = base + k * layout.audio_tokens
        window = {name: arrays[name][k : k + 1] for name in ("audio_values", "audio_frames")}
        add(first, first + layout.audio_tokens, layout.audio_tokens, partial(dict, window))
    text = (array.astype(np.int32) for array in (tokens, positions, moved))
    return Prompt(*text, tuple(media), taps, seen=np.concatenate(kept, axis=1) if kept else None)


def _pictures(images: Mapping[str, np.ndarray], layout: Layout) -> Iterator[tuple[int, int]]:
    """Start and end of the slots that the encoder must see together: those with the same number in an array of
    segment ids (of patches: one frame), else each alone."""
    names = [name for name, array in images.items() if name.endswith("segment_ids") and array.ndim == 1]
    if not names:
        yield from ((k, k + 1) for k in range(len(next(iter(images.values())))))
        return
    segments = images[names[0]]
    if not segments.any():  # a row without pictures among others
        return
    numbers, starts = np.unique(segments, return_index=True)
    starts = sorted(starts[numbers > 0].tolist())
    ends = [*starts[1:], int(np.flatnonzero(segments).max(initial=-1)) + 1]
    # the first slot of a frame is never padding, but its last ones may be (`mm_jax.data.patches.place`)
    block = 1 if layout.patches is None else layout.patches.block
    for start, end in zip(starts, ends, strict=True):
        yield start, start + -(-(end - start) // block) * block


def _mixed(
    index: np.ndarray, taps: tuple[np.ndarray, np.ndarray], each: int, count: int
) -> Iterator[tuple[int, int]]:
    """Start and end of the runs of slots, of `each` features, that mixtures reach across.

    Args:
      index: int [T], the feature that a token's distances count from, below 0 for none.
    """
    here = index >= 0
    places = index[here, None] + np.where(taps[1][here] != 0, taps[0][here], 0)
    furthest = np.arange(count)
    np.maximum.at(furthest, places.min(axis=1) // each, places.max(axis=1) // each)
    start = end = 0
    for slot in range(count):
        end = max(end, int(furthest[slot]))
        if slot == end:
            yield start, end + 1
            start = end = slot + 1


def _slots(images: Mapping[str, np.ndarray], start: int, end: int, slots: int) -> dict[str, np.ndarray]:
    """Some slots alone, padded to `slots`; what is numbered counts from 1 on, as if nothing stood before it."""
    found = {}
    for name, array in images.items():
        part = np.pad(array[start:end], [(0, slots - (end - start))] + [(0, 0)] * (array.ndim - 1))
        if name.endswith("segment_ids") and part.any():
            part = np.where(part > 0, part - part[part > 0].min() + 1, 0).astype(part.dtype)
        found[name] = part
    return found
