"""Several conversations in one row: first-fit packing under joint budgets, and the arrays of a batch.

Padding is the largest waste of a multimodal batch: conversations differ in length by a factor of ten. The
packer keeps a few dozen open rows and puts each example into the first one that has room for its tokens
*and* its pictures *and* its audio windows *and* its preference pair; segment ids keep the conversations of a
row apart. Examples are never cut: one that fits no empty row is refused with a reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_jax.data.example import TAPS
from mm_jax.data.patches import PatchLayout
from mm_jax.data.targets import NAMES
from mm_jax.errors import UserError

if TYPE_CHECKING:
    from mm_jax.data.example import Example


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Size of a batch; every batch of a stage has exactly these array shapes."""

    rows: int
    """Rows of one forward pass, over all devices and processes."""
    length: int
    """Tokens a row, media placeholders included (merged length)."""
    images: int = 0
    """Picture slots a row; 0: the batch has no picture arrays. Where pictures are cut into tiles a slot is a tile, and
    where they come in any size it is a patch."""
    audio: int = 0
    """Audio window slots a row; 0: the batch has no audio arrays."""
    pairs: int = 0
    """Preference pairs a row; above 0 only pairs are packed."""
    accumulate: int = 1
    """Batches summed into one step; above 1 all arrays get this as a leading axis."""
    bins: int = 32
    """Rows that stay open while packing. More waste less padding and mix the order of samples further."""
    streams: int = 0
    """Streams of samples that are packed apart, each for its share of the rows; as many processes as divide it see
    the same batches. 0: one for each process that reads, in its first start."""

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("length", 1), ("accumulate", 1), ("bins", 1),
                            ("images", 0), ("audio", 0), ("pairs", 0), ("streams", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"batch.{name} is {getattr(self, name)}; it must be at least {least}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shapes of one media slot and of its dense targets: what a batch without any picture cannot tell.

    image_tokens, audio_tokens: features a slot gives to the decoder.
    image_size: (height, width); audio_size: (frames, mels).
    slot_arrays: (name, trailing shape, dtype) of what the image encoder takes instead of pixel_values alone. Values
        of a name that ends in "segment_ids" number the pictures of a row; 0 is padding.
    taps: the batch has media_taps and tap_weights.
    position_axes: of positions [B, S, axes]; 0 for [B, S].
    image_labels: (patches, label words) and audio_labels: (positions, label words) of the dense targets;
        None: the batch has none.
    names: the batch has an array of that name.
    image_grid: (rows, columns) of the features of an image slot; zeros where they stand for no places.
    patches: how patches stand, of models that take pictures of any size; an image slot then is one patch.
    two_way: which tokens the array `blocks` joins, see `blocks_of`; "none": there is no such array.
    shares: into which the features of an image slot are divided in the array `seen`, for decoders that read features
        beside the text; 0: there is no such array.
    pad_id: token id of padding.
    """

    image_tokens: int = 0
    image_size: tuple[int, int] = (0, 0)
    audio_tokens: int = 0
    audio_size: tuple[int, int] = (0, 0)
    slot_arrays: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    taps: bool = False
    position_axes: int = 0
    image_labels: tuple[int, int] | None = None
    audio_labels: tuple[int, int] | None = None
    names: bool = False
    image_grid: tuple[int, int] = (0, 0)
    patches: PatchLayout | None = None
    two_way: str = "none"
    shares: int = 0
    pad_id: int = 0

    @property
    def image_arrays(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """(name, trailing shape, dtype) of what the image encoder takes."""
        return self.slot_arrays or (("pixel_values", (*self.image_size, 3), "float32"),)

    def image_features(self, slots: int) -> int:
        """Features that come of so many image slots."""
        if self.patches is not None:
            return slots // self.patches.merge**2
        return slots * self.image_tokens

    @classmethod
    def of(
        cls, processor: Any, *, targets: bool = False, names: bool = False, two_way: str = "none"
    ) -> Layout:
        """The layout of what `Processor.example(..., targets=targets, names=names)` makes, or a `PretrainedProcessor`
        that knows it."""
        if (known := getattr(processor, "layout", None)) is not None:
            return dataclasses.replace(known, names=names)
        return cls.of_config(
            processor.config, processor.pad_id, targets=targets, names=names, two_way=two_way
        )

    @classmethod
    def of_config(
        cls,
        config: Any,
        pad_id: int = 0,
        *,
        targets: bool = False,
        names: bool = False,
        two_way: str = "none",
    ) -> Layout:
        """`of` a processor that is not there yet, from its config."""
        fields: dict[str, Any] = {"pad_id": pad_id, "names": names, "two_way": two_way}
        if config.image is not None:
            size = (config.image.height, config.image.width)
            fields |= {"image_tokens": config.image.num_tokens, "image_size": size}
        if config.audio is not None:
            size = (config.audio.max_frames, config.audio.num_mels)
            fields |= {"audio_tokens": config.audio.num_tokens, "audio_size": size}
        if targets:
            words = len(config.targets.labels)
            if config.image is not None:
                rows, columns = config.targets.image_grid
                fields["image_labels"] = (rows * columns, words)
            if config.audio is not None:
                fields["audio_labels"] = (config.targets.audio_positions, words)
        return cls(**fields)


def size_of(example: Example) -> tuple[int, int, int, int]:
    """(tokens, pictures, audio windows, preference pairs) that an example takes of a row."""
    pair = int(example.preference >= 0)
    return len(example.tokens), example.num_images, example.num_audio, pair


def refusal(example: Example, batch: BatchConfig) -> tuple[str, str] | None:
    """Why an example fits no empty row, as (reason to count by, sentence), or None if it fits.

    >>> refusal(example_of_300_tokens, BatchConfig(rows=1, length=256))  # doctest: +SKIP
    ('too_long', '300 tokens, a row holds 256')
    """
    tokens, images, audio, pair = size_of(example)
    if tokens == 0:
        return "empty", "no tokens"
    if tokens > batch.length:
        return "too_long", f"{tokens} tokens, a row holds {batch.length}"
    if images > batch.images:
        return "too_many_images", f"{images} image slots, a row holds {batch.images}"
    if audio > batch.audio:
        return "too_much_audio", f"{audio} audio windows, a row holds {batch.audio}"
    if pair > batch.pairs:
        return "preference_pair", "a preference pair in a stage without pairs (batch.pairs is 0)"
    if batch.pairs and not pair:
        return "no_preference_pair", "no rejected answer, but the stage trains on preference pairs"
    return None


class FirstFitPacker:
    """Puts sizes into the first open row with room; items are opaque (here: an example with its stream
    position).

    Rows of 10 tokens, items "a".."e" of 6, 5, 4, 6, 7 tokens, two rows may be open: c joins a, d and e fit
    nowhere and push out the fullest row each time (the oldest of equals).

    >>> packer = FirstFitPacker(BatchConfig(rows=1, length=10, bins=2))
    >>> [packer.add(item, (tokens, 0, 0, 0)) for item, tokens in zip("abcde", (6, 5, 4, 6, 7))]
    [None, None, None, ['a', 'c'], ['d']]
    >>> packer.rows
    [['b'], ['e']]
    """

    def __init__(self, batch: BatchConfig):
        self._bins = batch.bins
        self._budget = (batch.length, batch.images, batch.audio, batch.pairs)
        self.rows: list[list[Any]] = []
        self._room: list[list[int]] = []

    def add(self, item: Any, size: Sequence[int]) -> list[Any] | None:
        """Place one item; the row that had to leave to make room for it, or None.

        Args:
            size: (tokens, pictures, audio windows, pairs); must fit an empty row (see `refusal`).
        """
        tokens, images, audio, pairs = size
        for row, room in zip(self.rows, self._room, strict=True):
            if room[0] >= tokens and room[1] >= images and room[2] >= audio and room[3] >= pairs:
                row.append(item)
                self._take(room, size)
                return None
        finished = None
        if len(self.rows) == self._bins:
            fullest = min(range(self._bins), key=lambda k: self._room[k][0])
            finished = self.rows.pop(fullest)
            self._room.pop(fullest)
        self.open([item], [size])
        return finished

    def open(self, items: Sequence[Any], sizes: Sequence[Sequence[int]]) -> None:
        """Append an open row that holds these items already: a new row, or one from a saved state."""
        room = list(self._budget)
        for size in sizes:
            self._take(room, size)
        if min(room) < 0 or len(self.rows) >= self._bins:
            rows = f"{len(self.rows)} of {self._bins} rows open"
            raise ValueError(f"the row does not fit: room left {room}, {rows}")
        self.rows.append(list(items))
        self._room.append(room)

    @staticmethod
    def _take(room: list[int], size: Sequence[int]) -> None:
        for k, amount in enumerate(size):
            room[k] -= amount


def collate(
    rows: Sequence[Sequence[Example]], batch: BatchConfig, layout: Layout, sources: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The batch arrays (keys and shapes: `mm_jax.data.example`) of packed rows.

    `media_index` counts the features of a row as [pictures: images * image_tokens | audio: audio *
    audio_tokens]; an example's own indices move by the slots taken before it in its row. Unused slots are
    zero.

    Args:
        rows: batch.rows * batch.accumulate lists of examples, each within the budget of a row.
        sources: source name -> number written into `sources`.

    Example: rows of 6 tokens, one picture slot of 2 features, two examples of 2 and 3 tokens, the second
    with the picture in front:

        tokens       [5 6 | 1 1 9 | 0]
        segment_ids  [1 1 | 2 2 2 | 0]
        positions    [0 1 | 0 1 2 | 0]
        media_index  [-1 -1 | 0 1 -1 | -1]
    """
    count = batch.rows * batch.accumulate
    if len(rows) != count:
        raise ValueError(f"{len(rows)} rows for a batch of {count}")
    arrays = _empty(count, batch, layout)
    audio_base = layout.image_features(batch.images)
    for r, row in enumerate(rows):
        at, segment, images, audio = 0, 0, 0, 0
        row_arrays = {key: array[r] for key, array in arrays.items()}
        for pair, example in enumerate(row):
            tokens = len(example.tokens)
            span = slice(at, at + tokens)
            row_arrays["tokens"][span] = example.tokens
            row_arrays["loss_weights"][span] = example.loss_weights
            row_arrays["segment_ids"][span] = example.segments + segment
            row_arrays["positions"][span] = example.positions
            row_arrays["sources"][span] = sources[example.source]
            if layout.taps and example.taps is not None:
                row_arrays["media_taps"][span], row_arrays["tap_weights"][span] = example.taps
            if layout.shares and batch.images and example.seen is not None:
                first = images * layout.shares
                row_arrays["seen"][span, first : first + example.seen.shape[1]] = example.seen
            if layout.names:
                row_arrays["names"][span] = example.names
            index = row_arrays["media_index"][span]
            np.copyto(index, example.image_index, where=example.image_index < -1)
            if example.num_images:
                offset = layout.image_features(images)
                np.copyto(index, example.image_index + offset, where=example.image_index >= 0)
                images = _fill_images(row_arrays, example, images, segment)
            if len(example.audio_values):
                offset = audio_base + audio * layout.audio_tokens
                np.copyto(index, example.audio_index + offset, where=example.audio_index >= 0)
                audio = _fill_audio(row_arrays, example, audio, segment)
            if batch.pairs:  # every example is a pair, see `refusal`: segments 2 * pair + 1 and + 2
                row_arrays["preference"][pair] = example.preference
            at += tokens
            segment += int(example.segments[-1])
    if layout.two_way != "none":
        arrays["blocks"] = blocks_of(layout.two_way, arrays)
    if batch.accumulate > 1:
        shape = (batch.accumulate, batch.rows)
        arrays = {key: array.reshape(*shape, *array.shape[1:]) for key, array in arrays.items()}
    return arrays


def blocks_of(two_way: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which tokens see each other whatever their order: int32 [B, S], a number above 0 for those of one block.

    Args:
        two_way: "media": every run of media tokens is a block. "prefix": of each segment that starts at position 0 the
            tokens before its first trained one, all of them where nothing is trained.
        arrays: of a batch, with media_index; or else with segment_ids, positions and loss_weights.

    >>> blocks_of("media", {"media_index": np.array([[-1, 0, 1, -1, 2, -1]])}).tolist()
    [[0, 1, 1, 0, 2, 0]]
    >>> segments, positions, weights = [[1, 1, 1, 2, 2, 0]], [[0, 1, 2, 0, 1, 0]], [[0, 0, 1, 0, 0, 0]]
    >>> rows = {"segment_ids": segments, "positions": positions, "loss_weights": weights}
    >>> blocks_of("prefix", {key: np.array(value) for key, value in rows.items()}).tolist()
    [[1, 1, 0, 1, 1, 0]]
    """
    if two_way == "media":
        media = arrays["media_index"] >= 0
        starts = media & ~np.pad(media, ((0, 0), (1, 0)))[:, :-1]
        return np.where(media, np.cumsum(starts, axis=1), 0).astype(np.int32)
    segments = arrays["segment_ids"]
    first = np.pad(segments, ((0, 0), (1, 0)))[:, :-1] != segments
    place = np.maximum.accumulate(
        np.where(first, np.arange(segments.shape[1]), 0), axis=1
    )  # of the segment's first
    trained = np.cumsum(arrays["loss_weights"] > 0, axis=1)
    before = np.take_along_axis(np.pad(trained, ((0, 0), (1, 0))), place, axis=1)
    whole = np.take_along_axis(arrays["positions"], place, axis=1) == 0
    return ((segments > 0) & whole & (trained == before)).astype(np.int32)


def _empty(count: int, batch: BatchConfig, layout: Layout) -> dict[str, np.ndarray]:
    text = (count, batch.length)
    arrays = {
        "tokens": np.full(text, layout.pad_id, np.int32),
        "segment_ids": np.zeros(text, np.int32),
        "positions": np.zeros((*text, layout.position_axes) if layout.position_axes else text, np.int32),
        "media_index": np.full(text, -1, np.int32),
        "sources": np.zeros(text, np.int32),
        "loss_weights": np.zeros(text, np.float32),
    }
    if layout.taps:
        arrays["media_taps"] = np.zeros((*text, TAPS), np.int32)
        arrays["tap_weights"] = np.zeros((*text, TAPS), np.float32)
        arrays["tap_weights"][..., 0] = 1
    if layout.names:
        arrays["names"] = np.full((*text, NAMES), -1, np.int32)
    if batch.images:
        slots = (count, batch.images)
        if layout.shares:
            arrays["seen"] = np.zeros((*text, batch.images * layout.shares), np.int8)
        for name, shape, dtype in layout.image_arrays:
            arrays[name] = np.zeros((*slots, *shape), dtype)
        arrays["image_segment_ids"] = np.zeros(slots, np.int32)
        if layout.image_labels is not None:
            arrays["image_labels"] = np.zeros((*slots, *layout.image_labels), np.uint8)
            arrays["image_boxes"] = np.full((*slots, layout.image_labels[0], 4), -1, np.int32)
    if batch.audio:
        slots = (count, batch.audio)
        arrays["audio_values"] = np.zeros((*slots, *layout.audio_size), np.float32)
        arrays["audio_frames"] = np.zeros(slots, np.int32)
        arrays["audio_segment_ids"] = np.zeros(slots, np.int32)
        if layout.audio_labels is not None:
            arrays["audio_labels"] = np.zeros((*slots, *layout.audio_labels), np.uint8)
    if batch.pairs:
        arrays["preference"] = np.full((count, batch.pairs), -1, np.int32)
    return arrays


def _fill_images(row: Mapping[str, np.ndarray], example: Example, taken: int, segment: int) -> int:
    """Write the pictures of one example behind the `taken` slots; the number of slots taken then."""
    slots = slice(taken, taken + example.num_images)
    for name, array in example.image_arrays.items():
        if name.endswith("segment_ids"):  # numbers go on behind those of the examples before
            array = np.where(array > 0, array + row[name].max(initial=0), 0)
        row[name][slots] = array
    # a preference pair shares its pictures: they carry the segment of the chosen answer
    row["image_segment_ids"][slots] = segment + 1
    if "image_labels" in row:
        row["image_labels"][slots] = example.image_labels
        row["image_boxes"][slots] = example.image_boxes
    return slots.stop


def _fill_audio(row: Mapping[str, np.ndarray], example: Example, taken: int, segment: int) -> int:
    slots = slice(taken, taken + len(example.audio_values))
    row["audio_values"][slots] = example.audio_values
    row["audio_frames"][slots] = example.audio_frames
    row["audio_segment_ids"][slots] = segment + 1
    if "audio_labels" in row:
        row["audio_labels"][slots] = example.audio_labels
    return slots.stop
