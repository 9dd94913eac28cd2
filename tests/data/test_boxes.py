"""Location tokens by literal example."""

import pytest

from mm_jax.data.boxes import BoxFormat
from mm_jax.errors import UserError


def test_bins():
    boxes = BoxFormat(bins=10, first_id=100)
    assert boxes.encode((0.0, 0.19, 0.2, 1.0)) == (100, 101, 102, 109)
    assert boxes.decode((100, 101, 102, 109)) == pytest.approx((0.05, 0.15, 0.25, 0.95))
    assert BoxFormat.names(3) == ["<loc_0>", "<loc_1>", "<loc_2>"]


def test_every_bin_survives():
    boxes = BoxFormat(bins=64, first_id=7)
    for k in range(7, 7 + 64 - 3):
        ids = (k, k + 1, k + 2, k + 3)
        assert boxes.encode(boxes.decode(ids)) == (k, k + 1, k + 2, k + 3)


def test_decoded_corners_are_in_order():
    assert BoxFormat(bins=10, first_id=0).decode((8, 9, 1, 2)) == pytest.approx((0.15, 0.25, 0.85, 0.95))


def test_is_location():
    boxes = BoxFormat(bins=10, first_id=100)
    assert [boxes.is_location(k) for k in (99, 100, 109, 110)] == [False, True, True, False]


def test_bad_bins():
    with pytest.raises(UserError, match="at least 2"):
        BoxFormat(bins=1, first_id=0)
