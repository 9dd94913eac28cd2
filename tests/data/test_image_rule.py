"""Image rules by pixels, and box transforms by literal numbers."""

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from mm_jax.data.image import ImageRule, Transform
from mm_jax.errors import UserError


def test_pad_centres_on_the_mean_colour():
    rule = ImageRule(height=64, width=64, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    pixels, transform = rule(PIL.Image.new("RGB", (200, 100), (255, 255, 255)))
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.float32
    assert transform == Transform((200, 100), (0.32, 0.32), (0, 16), (64, 64))
    np.testing.assert_allclose(pixels[16:48], np.broadcast_to([1.0, 3.0, 1.0], (32, 64, 3)), rtol=1e-6)
    # the mean in 8 bits: within half a step of zero
    assert np.abs(pixels[:16]).max() <= 0.5 / 255 / 0.25 + 1e-6
    assert np.abs(pixels[48:]).max() <= 0.5 / 255 / 0.25 + 1e-6


def test_pad_colour():
    rule = ImageRule(pad_colour=(255, 0, 0))
    pixels, _ = rule(PIL.Image.new("RGB", (10, 20)))
    np.testing.assert_allclose(pixels[0, 0], [1, -1, -1], atol=1e-6)
    np.testing.assert_allclose(pixels[32, 32], [-1, -1, -1], atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("pad", (200, 100), Transform((200, 100), (0.32, 0.32), (0, 16), (64, 64))),
        ("pad", (32, 64), Transform((32, 64), (1.0, 1.0), (16, 0), (64, 64))),
        ("pad", (16, 8), Transform((16, 8), (4.0, 4.0), (0, 16), (64, 64))),
        ("pad", (1000, 1), Transform((1000, 1), (0.064, 1.0), (0, 31), (64, 64))),
        ("stretch", (200, 100), Transform((200, 100), (0.32, 0.64), (0, 0), (64, 64))),
        ("crop", (200, 100), Transform((200, 100), (0.64, 0.64), (-32, 0), (64, 64))),
        ("crop", (64, 128), Transform((64, 128), (1.0, 1.0), (0, -32), (64, 64))),
    ],
)
def test_transforms(mode, size, expected):
    rule = ImageRule(mode=mode)
    assert rule.transform(size) == expected
    assert rule(PIL.Image.new("RGB", size))[1] == expected


@pytest.mark.parametrize(
    ("mode", "box", "forward", "inverse"),
    [
        # 200 x 100 into 64 x 64: scale 0.32, 16 rows of padding above
        ("pad", (50, 25, 100, 50), (0.25, 0.375, 0.5, 0.5), (50, 25, 100, 50)),
        ("pad", (0, 0, 200, 100), (0.0, 0.25, 1.0, 0.75), (0, 0, 200, 100)),
        ("stretch", (50, 25, 100, 50), (0.25, 0.25, 0.5, 0.5), (50, 25, 100, 50)),
        # scale 0.64, 32 columns cut off on either side: x 50..150 is what stays
        ("crop", (75, 25, 100, 50), (0.25, 0.25, 0.5, 0.5), (75, 25, 100, 50)),
        ("crop", (0, 0, 100, 50), (0.0, 0.0, 0.5, 0.5), (50, 0, 100, 50)),
    ],
)
def test_boxes_move_with_the_picture(mode, box, forward, inverse):
    transform = ImageRule(mode=mode).transform((200, 100))
    assert transform.forward(box) == pytest.approx(forward)
    assert transform.inverse(transform.forward(box)) == pytest.approx(inverse)


def test_inverse_clips_to_the_picture():
    # the padding above and below does not belong to the original
    transform = ImageRule().transform((200, 100))
    assert transform.inverse((0.0, 0.0, 1.0, 1.0)) == (0.0, 0.0, 200.0, 100.0)


@pytest.mark.parametrize("mode", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("size", [(97, 61), (40, 90), (128, 128)])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_the_box_of_a_drawn_rectangle_stays_around_it(mode, size, resample):
    image = PIL.Image.new("RGB", size)
    box = (size[0] // 2 - 9, size[1] // 2 - 12, size[0] // 2 + 15, size[1] // 2 + 10)
    PIL.ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(255, 255, 255))
    rule = ImageRule(height=48, width=64, mode=mode, resample=resample, pad_colour=(0, 0, 0))
    pixels, transform = rule(image)
    rows, columns = np.nonzero(pixels[:, :, 0] > 0)
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    expected = np.array(transform.forward(box)) * [64, 48, 64, 48]
    np.testing.assert_allclose(found, expected, atol=1.0)


def test_bad_rules():
    with pytest.raises(UserError, match='mode "padd" is unknown; did you mean "pad"'):
        ImageRule(mode="padd")
    with pytest.raises(UserError, match="resample"):
        ImageRule(resample="cubic")
    with pytest.raises(UserError, match="pad_colour"):
        ImageRule(pad_colour="white")
    with pytest.raises(UserError, match="at least 1"):
        ImageRule(height=0)
