import numpy as np
import pytest
from standins import DENSE, LAYOUT, Encode, Numbers, example

from mm_jax.data.packing import BatchConfig, FirstFitPacker, collate, refusal, size_of
from mm_jax.errors import UserError


def test_first_fit_by_literal_example():
    packer = FirstFitPacker(BatchConfig(rows=1, length=10, bins=2))
    finished = [packer.add(item, (n, 0, 0, 0)) for item, n in zip("abcde", (6, 5, 4, 6, 7), strict=True)]
    assert finished == [None, None, None, ["a", "c"], ["d"]]
    assert packer.rows == [["b"], ["e"]]


@pytest.mark.parametrize("budget", ["images", "audio", "pairs"])
def test_every_budget_closes_a_row(budget):
    batch = BatchConfig(rows=1, length=100, bins=4, **{budget: 2})
    size = [1, 0, 0, 0]
    size[("length", "images", "audio", "pairs").index(budget)] = 1
    packer = FirstFitPacker(batch)
    for item in range(5):
        assert packer.add(item, size) is None
    assert packer.add("text", (1, 0, 0, 0)) is None  # text still fits the first row
    assert packer.rows == [[0, 1, "text"], [2, 3], [4]]


def test_open_rows_come_back_with_the_room_they_had():
    batch = BatchConfig(rows=1, length=10, bins=2, images=1)
    packer = FirstFitPacker(batch)
    packer.open(["a", "b"], [(3, 1, 0, 0), (4, 0, 0, 0)])
    assert packer.add("c", (3, 0, 0, 0)) is None and packer.rows == [["a", "b", "c"]]
    assert packer.add("d", (1, 0, 0, 0)) is None and packer.rows[1] == ["d"]
    with pytest.raises(ValueError, match="does not fit"):
        FirstFitPacker(batch).open(["a"], [(11, 0, 0, 0)])


def test_what_fits_no_row_is_refused_and_never_cut():
    batch = BatchConfig(rows=1, length=8, images=1, audio=1)
    assert refusal(example(range(8)), batch) is None
    assert refusal(example(range(9)), batch) == ("too_long", "9 tokens, a row holds 8")
    assert refusal(example([]), batch) == ("empty", "no tokens")
    assert refusal(example(range(8), images=2), batch) == ("too_many_images", "2 image slots, a row holds 1")
    assert refusal(example(range(8), audio=2), batch) == ("too_much_audio", "2 audio windows, a row holds 1")
    assert refusal(example(range(8), preference=0), batch)[0] == "preference_pair"
    assert refusal(example(range(8)), BatchConfig(rows=1, length=8, pairs=1))[0] == "no_preference_pair"


def test_batch_sizes_are_checked():
    with pytest.raises(UserError, match="batch.rows is 0"):
        BatchConfig(rows=0, length=8)
    with pytest.raises(UserError, match="batch.images is -1"):
        BatchConfig(rows=1, length=8, images=-1)


def test_collate_by_literal_example():
    """Three picture and two clip slots: features 0-2, 3-5 and 6-8 are pictures, 9-10 and 11-12 are clips."""
    row = [
        example([9, 9, 9, 5, 6], images=1, source="b", fill=1),
        example([7, 8]),
        example([9, 9, 9, 4, 4, 3], images=1, audio=1, fill=2),
    ]
    batch = collate([row, []], BatchConfig(rows=2, length=16, images=3, audio=2), LAYOUT, {"a": 0, "b": 1})
    expected = {
        "tokens": [9, 9, 9, 5, 6, 7, 8, 9, 9, 9, 4, 4, 3, 0, 0, 0],
        "segment_ids": [1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 0, 0, 0],
        "positions": [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 5, 0, 0, 0],
        "media_index": [0, 1, 2, -1, -1, -1, -1, 3, 4, 5, 9, 10, -1, -1, -1, -1],
        "sources": [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        "loss_weights": [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0],
        "image_segment_ids": [1, 3, 0],
        "audio_segment_ids": [3, 0],
        "audio_frames": [5, 0],
    }
    for key, value in expected.items():
        assert batch[key][0].tolist() == value, key
        assert batch[key].dtype == (np.float32 if key == "loss_weights" else np.int32), key
    pixels = batch["pixel_values"]
    assert pixels.shape == (2, 3, 4, 5, 3) and pixels.dtype == np.float32
    assert pixels[0].mean((1, 2, 3)).tolist() == [1, 2, 0] and not pixels[1].any()
    assert batch["audio_values"].shape == (2, 2, 6, 2)
    assert batch["audio_values"][0].mean((1, 2)).tolist() == [2, 0]
    assert not batch["segment_ids"][1].any() and (batch["media_index"][1] == -1).all()
    assert set(batch) == {*expected, "pixel_values", "audio_values"}


def test_arrays_that_the_budget_excludes_are_absent():
    batch = collate([[example([1, 2])]], BatchConfig(rows=1, length=4), DENSE, {"a": 0})
    assert sorted(batch) == ["loss_weights", "media_index", "positions", "segment_ids", "sources", "tokens"]


def test_preference_pairs_have_two_segments_and_share_their_picture():
    pair = [1, 1, 1, 1, 2, 2]
    row = [
        example([9, 9, 9, 4, 5, 6], images=1, preference=7, segments=pair),
        example([9, 9, 9, 1, 2, 3], images=1, preference=3, segments=pair),
    ]
    batch = collate([row], BatchConfig(rows=1, length=14, images=2, pairs=3), LAYOUT, {"a": 0})
    assert batch["preference"].tolist() == [[7, 3, -1]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0, 1, 0, 0]]
    assert batch["image_segment_ids"].tolist() == [[1, 3]]


def test_dense_targets_stand_beside_their_slot():
    encode, source = Encode(images=2, audio=2, targets=True), Numbers("a", 50)
    examples = [encode(source[i]) for i in range(50)]
    chosen = next(e for e in examples if len(e.pixel_values) == 1 and len(e.audio_values) == 2)
    batch = collate([[chosen]], BatchConfig(rows=1, length=99, images=2, audio=2), DENSE, {"a": 0})
    assert batch["image_labels"].shape == (1, 2, 4, 2) and batch["image_labels"].dtype == np.uint8
    assert batch["image_boxes"].shape == (1, 2, 4, 4) and batch["image_boxes"].dtype == np.int32
    np.testing.assert_array_equal(batch["image_labels"][0, 0], chosen.image_labels[0])
    np.testing.assert_array_equal(batch["image_boxes"][0, 0], chosen.image_boxes[0])
    assert (batch["image_boxes"][0, 1] == -1).all() and not batch["image_labels"][0, 1].any()
    np.testing.assert_array_equal(batch["audio_labels"][0], chosen.audio_labels)


def test_accumulation_is_a_leading_axis():
    rows = [[example([k])] for k in range(6)]
    batch = collate(rows, BatchConfig(rows=3, length=2, images=1, accumulate=2), LAYOUT, {"a": 0})
    assert batch["tokens"].shape == (2, 3, 2) and batch["pixel_values"].shape == (2, 3, 1, 4, 5, 3)
    assert batch["tokens"][..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("images", [0, 2])
def test_at_least_95_percent_real_tokens(images):
    """Log-normal lengths around 40 tokens in rows of 256, with and without pictures that share the budget."""
    batch = BatchConfig(rows=1, length=256, images=12 if images else 0)
    encode, source = Encode(median=40, longest=220, images=images), Numbers("a", 4000)
    packer = FirstFitPacker(batch)
    finished = []
    for i in range(len(source)):
        sample = encode(source[i])
        row = packer.add(sample, size_of(sample))
        finished += [row] if row else []
    share = np.mean([sum(len(e.tokens) for e in row) / 256 for row in finished])
    assert share >= 0.95
