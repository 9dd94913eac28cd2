"""Dense targets by literal example."""

import numpy as np
import pytest

from mm_jax.data.image import ImageRule
from mm_jax.data.messages import Region
from mm_jax.data.targets import CENTRE, NAMES, TargetRule, token_names
from mm_jax.errors import UserError

RULE = TargetRule(labels=("blue", "circle", "red"), box_bins=8, image_grid=(4, 4), audio_positions=10)
SAME = ImageRule().transform((64, 64))  # 64 x 64 pixels, patches of 16


def marks(regions, transform=SAME):
    labels, boxes = RULE.image(regions, transform)
    assert labels.dtype == np.uint8
    assert boxes.dtype == np.int32
    return labels.reshape(4, 4, 3), boxes.reshape(4, 4, 4)


def test_words_and_boxes():
    labels, boxes = marks([Region("red circle", (16, 0, 48, 16)), Region("blue thing", (0, 32, 16, 64))])
    assert labels[:, :, 2].tolist() == [[0, 1, 1, 0], [0] * 4, [0] * 4, [0] * 4]
    assert labels[:, :, 1].tolist() == labels[:, :, 2].tolist()
    assert labels[:, :, 0].tolist() == [[0] * 4, [0] * 4, [1, 0, 0, 0], [1, 0, 0, 0]]
    assert boxes[0, 1].tolist() == boxes[0, 2].tolist() == [2, 0, 6, 2]
    assert boxes[3, 0].tolist() == [0, 4, 2, 7]  # 64 / 64 * 8 is beyond the last bin
    assert boxes[1, 1].tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("box", "patches"),
    [
        ((7, 7, 9, 9), [(0, 0)]),  # small, on a centre
        ((0, 0, 3, 3), [(0, 0)]),  # small, away from the centre: all of it lies here
        ((0, 0, 20, 16), [(0, 0), (0, 1)]),  # a quarter of the second patch
        ((14, 14, 18, 18), [(0, 0), (0, 1), (1, 0), (1, 1)]),  # a quarter of the region in each
        ((0, 0, 19, 16), [(0, 0)]),  # 3 / 16 of the second patch and 3 / 19 of the region: too little
        ((0, 0, 64, 64), [(r, c) for r in range(4) for c in range(4)]),
        ((70, 0, 90, 16), []),  # outside
        ((8, 8, 8, 20), []),  # empty
    ],
)
def test_which_patches(box, patches):
    labels, _ = marks([Region("red", box)])
    assert list(zip(*(axis.tolist() for axis in np.nonzero(labels[:, :, 2])), strict=True)) == patches


def test_the_smallest_box_wins_and_words_add_up():
    labels, boxes = marks([Region("blue", (0, 0, 64, 64)), Region("red", (0, 0, 16, 16))])
    assert labels[0, 0].tolist() == [1, 0, 1]
    assert boxes[0, 0].tolist() == [0, 0, 2, 2]
    assert boxes[1, 1].tolist() == [0, 0, 7, 7]


def test_regions_move_with_the_picture():
    # 128 x 64 is halved and padded by 16 rows above
    labels, boxes = marks([Region("red", (0, 0, 32, 32))], ImageRule().transform((128, 64)))
    assert np.argwhere(labels[:, :, 2]).tolist() == [[1, 0]]
    assert boxes[1, 0].tolist() == [0, 2, 2, 4]


def test_audio_positions():
    # windows of 1 s, positions of 0.1 s with middles at 0.05, 0.15, ...
    labels = RULE.audio([Region("red", (0.1, 0.36)), Region("blue", (0.9, 1.2))], 2, 1.0)
    assert labels.dtype == np.uint8
    assert labels[0, :, 2].tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert labels[0, :, 0].tolist() == [0] * 9 + [1]
    assert labels[1, :, 0].tolist() == [1, 1] + [0] * 8


def test_a_short_word_marks_one_position():
    labels = RULE.audio([Region("red", (0.46, 0.49)), Region("blue", (0.31, 0.31))], 1, 1.0)
    assert np.argwhere(labels[0]).tolist() == [[4, 2]]


def test_nothing_there():
    labels, boxes = marks([])
    assert not labels.any()
    assert (boxes == -1).all()
    assert RULE.audio([], 3, 1.0).shape == (3, 10, 3)


def test_bad_rule():
    with pytest.raises(UserError, match="at least 1"):
        TargetRule(image_grid=(0, 4))


def test_the_middle_patch_of_a_region_carries_the_centre():
    rule = TargetRule(labels=(CENTRE, "red"), box_bins=8, image_grid=(4, 4))
    regions = [Region("red", (0, 0, 64, 32)), Region("red", (60, 60, 64, 64))]
    labels = rule.image(regions, SAME)[0].reshape(4, 4, 2)
    assert np.argwhere(labels[..., 0]).tolist() == [[1, 2], [3, 3]]
    assert labels[..., 1].sum() == 9


def test_token_names_by_example():
    """Two rows of two patches, a token for each column; label 1 is no name, labels 0 and 2 are ids 7 and 9."""
    labels = np.array([[[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]], np.uint8)
    ids = np.array([7, -1, 9], np.int32)
    rest = [-1] * (NAMES - 2)
    columns = token_names(labels, (2, 2), (2, 1), ids)
    assert columns.tolist() == [[[7, 9, *rest], [-1, -1, *rest]]]
    patches = token_names(labels, (2, 2), (1, 1), ids)
    assert patches[0, :, :2].tolist() == [[7, -1], [-1, -1], [9, -1], [-1, -1]]
