"""Grounded text of Kosmos-2: phrases, and boxes as pairs of location tokens (Peng et al. 2023, section 3).

A picture is a grid of bins x bins cells, numbered row by row from 0. A box is the pair of its first and last cell:

    <phrase>a fire</phrase><object><patch_index_0005><patch_index_0911></object>

Several boxes of one phrase stand in one object, with a delimiter between them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mm_jax.data.image import Transform
from mm_jax.data.media_rule import MEDIA, FixedImage, Item
from mm_jax.data.messages import Box, Part, Text
from mm_jax.errors import UserError

BINS = 32
DELIMITER = "</delimiter_of_multi_objects/>"
BEGIN_OF_PICTURE, END_OF_PICTURE = "<image>", "</image>"
_PAIR = r"<patch_index_(\d+)><patch_index_(\d+)>"
_PAIRS = _PAIR.replace("(", "(?:")
_OBJECT = re.compile(
    rf"(?:<phrase>([^<]+)</phrase>)?<object>({_PAIRS}(?:{re.escape(DELIMITER)}{_PAIRS})*)</object>"
)
_TAG = re.compile("<.*?>")

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Entity:
    """A phrase and where it is.

    Attributes:
      phrase: "" where the text has a box without one.
      span: (start, end) of the phrase in the caption.
      boxes: (x0, y0, x1, y1) in 0..1 of the model's picture.
    """

    phrase: str
    span: tuple[int, int]
    boxes: tuple[Corners, ...]


def cells_of(box: Sequence[float], bins: int = BINS) -> tuple[int, int]:
    """First and last cell of a box in 0..1.

    >>> cells_of((0.390625, 0.046875, 0.984375, 0.828125))
    (44, 863)
    """
    x0, y0 = (min(max(math.floor(v * bins), 0), bins - 1) for v in box[:2])
    x1, y1 = (min(max(math.ceil(v * bins - 1), 0), bins - 1) for v in box[2:])
    return y0 * bins + x0, y1 * bins + x1


def box_of(first: int, last: int, bins: int = BINS) -> Corners:
    """The box of a pair of cells: between their middles or, where they share a row or a column, their outer edges.

    >>> box_of(44, 863)
    (0.390625, 0.046875, 0.984375, 0.828125)
    >>> box_of(0, 3, bins=2)
    (0.25, 0.25, 0.75, 0.75)
    >>> box_of(0, 1, bins=2)
    (0.0, 0.0, 1.0, 0.5)
    """
    (y0, x0), (y1, x1) = divmod(first, bins), divmod(last, bins)
    inset = 0.0 if x0 == x1 or y0 == y1 else 0.5
    return (x0 + inset) / bins, (y0 + inset) / bins, (x1 + 1 - inset) / bins, (y1 + 1 - inset) / bins


def read_grounding(text: str, bins: int = BINS) -> tuple[str, list[Entity]]:
    """The caption without tags, and its entities in order.

    >>> read_grounding("<grounding> Here<phrase> a fire</phrase><object><patch_index_0005><patch_index_0911></object>.")
    ('Here a fire.', [Entity(phrase='a fire', span=(5, 11), boxes=((0.171875, 0.015625, 0.484375, 0.890625),))])
    """
    caption = _TAG.sub("", text)
    stripped = len(caption) - len(caption.lstrip())
    entities = []
    for match in _OBJECT.finditer(text):
        phrase, pairs = match.group(1), match.group(2)
        boxes = [box_of(int(a), int(b), bins) for a, b in re.findall(_PAIR, pairs)]
        at = match.start() if phrase is None else match.start(1)
        start = len(_TAG.sub("", text[:at])) - stripped
        if phrase is None:
            entities += [Entity("", (start, start), (box,)) for box in boxes]
            continue
        end = start + len(phrase.rstrip())
        start += len(phrase) - len(phrase.lstrip())
        entities.append(Entity(phrase.strip(), (start, end), tuple(boxes)))
    return caption.strip(), entities


def grounded_parts(text: str, transforms: Sequence[Transform], bins: int = BINS) -> list[Part]:
    """An answer as parts: each phrase is followed by its boxes, in pixels of the original picture, the last one."""
    caption, entities = read_grounding(text.rpartition(END_OF_PICTURE)[2], bins)
    if not transforms:
        return [Text(caption)] if caption else []
    return list(_parts(caption, entities, transforms[-1], len(transforms) - 1))


def _parts(caption: str, entities: Sequence[Entity], transform: Transform, image: int) -> Iterator[Part]:
    at = 0
    for entity in sorted(entities, key=lambda entity: entity.span[1]):
        end = max(entity.span[1], 0)
        if caption[at:end]:
            yield Text(caption[at:end])
        yield from (Box(transform.inverse(box), image) for box in entity.boxes)
        at = end
    if caption[at:]:
        yield Text(caption[at:])


def write_object(boxes: Sequence[Sequence[float]], bins: int = BINS) -> str:
    """Boxes in 0..1 of the model's picture as the object behind a phrase.

    >>> write_object([(0.0, 0.0, 0.5, 1.0)])
    '<object><patch_index_0000><patch_index_1007></object>'
    """
    pairs = (cells_of(box, bins) for box in boxes)
    return (
        "<object>"
        + DELIMITER.join(f"<patch_index_{a:04d}><patch_index_{b:04d}>" for a, b in pairs)
        + "</object>"
    )


class GroundedImage(FixedImage):
    """Pictures of one size, of a system that grounds its text; an array says where their features go."""

    pieces = "first"
    kept = r"<[^<>]*>"
    placeholders = {"image": BEGIN_OF_PICTURE}
    ignored = (*FixedImage.ignored, "image_embeds_position_mask")

    def marked(self, input_ids: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        if arrays.get("image_embeds_position_mask") is None:
            return input_ids
        places = np.asarray(arrays["image_embeds_position_mask"]).astype(bool)
        if places.shape != input_ids.shape:
            raise UserError(
                f"image_embeds_position_mask has shape {list(places.shape)}, input_ids {list(input_ids.shape)}"
            )
        return np.where(places, self.tokens["image"], input_ids)

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        text = f"{BEGIN_OF_PICTURE}{MEDIA * self.num_tokens}{END_OF_PICTURE}"
        return [replace(item, text=text) for item in super().items(kind, arrays, counts)]

    def write_box(self, box: Box, transform: Transform) -> str:
        return write_object([transform.forward(box.box)])

    def parse(self, text: str, transforms: Sequence[Transform]) -> list[Part]:
        return grounded_parts(text, transforms)
