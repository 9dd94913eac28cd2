"""Kosmos-2's grounded text: boxes to cells and back, and answers to parts."""

import numpy as np
import pytest

from mm_jax.data.grounding import BINS, box_of, cells_of, grounded_parts, read_grounding, write_object
from mm_jax.data.image import Transform
from mm_jax.data.messages import Box, Text

TEXT = (
    "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object> warming "
    "himself by<phrase> a fire</phrase><object><patch_index_0005><patch_index_0911>"
    "</delimiter_of_multi_objects/><patch_index_0000><patch_index_0001></object>."
)


def test_cells_there_and_back():
    """Every pair of cells that share no row or column comes back; with one shared its outer edges are the box."""
    random = np.random.default_rng(0)
    for _ in range(200):
        (x0, x1), (y0, y1) = np.sort(random.integers(0, BINS, (2, 2)))
        first, last = y0 * BINS + x0, y1 * BINS + x1
        box = box_of(first, last)
        assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
        assert cells_of(box) == (first, last)


def test_parts_in_original_pixels():
    wide = Transform(original=(640, 320), scale=(0.35, 0.7), offset=(0, 0), size=(224, 224))
    parts = grounded_parts("<image>x</image>" + TEXT, [wide])
    texts = [part.text for part in parts if isinstance(part, Text)]
    assert texts == ["An image of a snowman", " warming himself by a fire", "."]
    boxes = [part.box for part in parts if isinstance(part, Box)]
    assert boxes[0] == pytest.approx((0.390625 * 640, 0.046875 * 320, 0.984375 * 640, 0.828125 * 320))
    assert len(boxes) == 3 and boxes[2] == pytest.approx((0, 0, 2 / 32 * 640, 1 / 32 * 320))
    assert [type(part) for part in parts] == [Text, Box, Text, Box, Box, Text]
    assert grounded_parts(TEXT, []) == [Text("An image of a snowman warming himself by a fire.")]


def test_what_is_written_is_read():
    boxes = [(0.1, 0.2, 0.7, 0.9), (0.5, 0.0, 1.0, 0.4)]
    text = f"<phrase>x</phrase>{write_object(boxes)}"
    caption, (entity,) = read_grounding(text)
    assert caption == entity.phrase == "x"
    np.testing.assert_allclose(entity.boxes, boxes, atol=1 / BINS)


def test_the_reference_reads_the_same():
    reference = pytest.importorskip("transformers.models.kosmos2.processing_kosmos2")
    random = np.random.default_rng(0)
    odd = [
        "  no boxes at all ",
        "<phrase> half",
        "<object><patch_index_0007><patch_index_0040></object> alone",
        "",
    ]
    for text in (TEXT, "  " + TEXT, TEXT + " <phrase>b </phrase> no object", *odd):
        caption, entities = read_grounding(text)
        expected, found = reference.clean_text_and_extract_entities_with_bboxes(text)
        assert caption == expected
        assert [(e.span, list(e.boxes)) for e in entities] == [(span, boxes) for _, span, boxes in found]
        assert all(e.phrase == name or (not e.phrase and "patch_index" in name)
                   for e, (name, _, _) in zip(entities, found, strict=True))  # fmt: skip
    for box in np.sort(random.uniform(0, 1, (100, 2, 2)), axis=1).reshape(100, 4):
        assert cells_of(box) == reference.coordinate_to_patch_index(tuple(box), BINS)
