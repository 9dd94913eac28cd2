"""Patches of pictures against the reference's image processors."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

from mm_jax.data.native_pixels import NativePixels, pixel_bounds  # noqa: E402
from mm_jax.data.pixels import BICUBIC, CLIP_MEAN, CLIP_STD, PixelRule  # noqa: E402
from mm_jax.errors import UserError  # noqa: E402
from tests.parity.record import note  # noqa: E402

DEFAULTS = {
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "resample": BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
# whose settings are like these
FAMILIES = {"defaults": ("qwen2_vl", "qwen2_5_vl"), "small": (), "qwen3": ("qwen3_vl", "qwen3_vl_moe")}
SETTINGS = {
    "defaults": {},
    "small": {"min_pixels": 40 * 40, "max_pixels": 120 * 120, "patch_size": 8},
    "qwen3": {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
              "size": {"shortest_edge": 64 * 64, "longest_edge": 256 * 256}},
}  # fmt: skip
SIZES = ((97, 131), (20, 400), (300, 16), (28, 28), (641, 479))


@pytest.mark.parametrize("name", SETTINGS)
def test_pictures(name):
    settings = SETTINGS[name]
    theirs = Qwen2VLImageProcessorPil(**settings)
    rule = PixelRule.read(settings, DEFAULTS)
    bounds = pixel_bounds(settings, DEFAULTS)
    ours = NativePixels(rule, bounds, settings.get("patch_size", 14), 2, 2)
    random = np.random.default_rng(0)
    for size in SIZES:
        picture = random.integers(0, 256, (*size, 3), np.uint8)
        expected = theirs(picture, return_tensors="np", input_data_format="channels_last")
        patches, grid = ours.picture(picture)
        assert grid == tuple(expected["image_grid_thw"][0])
        error = float(np.abs(patches - expected["pixel_values"]).max())
        assert error < 1e-6
        for family in FAMILIES[name]:
            note(family, "preprocessing", error)


def test_too_long():
    rule = PixelRule.read({}, DEFAULTS)
    ours = NativePixels(rule, (3136, 10**6), 14, 2, 2)
    with pytest.raises(UserError, match="more than 200 times"):
        ours.picture(np.zeros((2, 500, 3), np.uint8))
