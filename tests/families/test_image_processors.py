"""Pixel values against transformers' image processors on Pillow, with settings as their files have them."""

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

from mm_jax.data.media_rule import Settings  # noqa: E402
from mm_jax.data.pixels import PixelRule  # noqa: E402
from mm_jax.families import FAMILIES  # noqa: E402
from mm_jax.families.media import media_rule  # noqa: E402

CASES = {
    "blip-2": ("BlipImageProcessorPil", dict(size={"height": 24, "width": 24})),
    "instructblip": ("BlipImageProcessorPil", dict(size={"height": 24, "width": 32})),
    "kosmos-2": (
        "CLIPImageProcessorPil",
        dict(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    ),
    "gemma3": ("Gemma3ImageProcessorPil", dict(size={"height": 24, "width": 24})),
    "paligemma": ("SiglipImageProcessorPil", dict(size={"height": 24, "width": 24}, resample=2)),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_same_to_the_bit(kind, tmp_path):
    """Odd sizes, ratios from 1 to 20, and whatever the file leaves to the class."""
    name, options = CASES[kind]
    processor = getattr(transformers, name)(**options)
    processor.save_pretrained(tmp_path)
    named = {} if kind == "kosmos-2" else {"image_token_index": 7}
    system = FAMILIES[kind].system({"model_type": kind} | named, frozenset())
    rule = media_rule(system, Settings.read(tmp_path))
    random = np.random.default_rng(0)
    sizes = ((24, 24), (31, 57), (200, 10), (13, 260), (1, 1))
    pictures = [random.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    expected = processor(pictures, input_data_format="channels_last")["pixel_values"]
    assert np.array_equal(rule.images(pictures)["pixel_values"], np.stack(expected))


def test_the_longest_side_and_zeros_below(tmp_path):
    """SAM's, for a tower that is put in front of a decoder; where a box lands."""
    processor = transformers.SamImageProcessorPil(
        size={"longest_edge": 40}, pad_size={"height": 40, "width": 40}
    )
    processor.save_pretrained(tmp_path)
    rule = PixelRule.read(Settings.read(tmp_path).need("image"), {})
    random = np.random.default_rng(0)
    for size in ((40, 40), (31, 57), (200, 10), (13, 260)):
        picture = random.integers(0, 256, (*size, 3)).astype(np.uint8)
        expected = processor([picture], input_data_format="channels_last")["pixel_values"][0]
        assert np.array_equal(rule(picture).transpose(2, 0, 1), expected)
    transform = rule.transform((80, 20))
    assert transform.size == (40, 40) and np.allclose(transform.forward((40, 0, 80, 20)), (0.5, 0, 1, 0.25))
