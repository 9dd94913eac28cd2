"""Hand-made attention must light the right pixels."""

import numpy as np
import PIL.Image

from mm_jax.data.image import ImageRule
from mm_jax.evaluate.attention_map import overlay, patch_weights, to_original, token_weights
from mm_jax.models import ProjectorConfig


def test_token_weights_take_the_rows_that_chose_the_word():
    # text, picture 0 (2 tokens), picture 1 (2 tokens), text, answer, answer
    image_index = np.array([-1, 0, 1, 2, 3, -1])
    attention = np.zeros((2, 1, 8, 8), np.float32)
    attention[:, 0, 5] = [0.1, 0.2, 0.3, 0.1, 0.2, 0.1, 0, 0]
    attention[0, 0, 6] = [0, 0, 0, 1, 0, 0, 0, 0]
    np.testing.assert_allclose(token_weights(attention, [5], image_index, 0, 2), [0.2, 0.3])
    np.testing.assert_allclose(token_weights(attention, [5], image_index, 2, 2), [0.1, 0.2])
    # mean over two layers, of which one looks at the first token of picture 1, and over two rows
    np.testing.assert_allclose(token_weights(attention, [5, 6], image_index, 2, 2), [0.3, 0.1])


def test_merged_tokens_light_their_block():
    tokens = np.zeros(4, np.float32)
    tokens[1] = 1
    patches = patch_weights(tokens, ProjectorConfig("mlp", merge=(2, 2)), (4, 4))
    expected = np.zeros((4, 4))
    expected[:2, 2:] = 0.25
    np.testing.assert_allclose(patches, expected)


def test_resampler_passes_its_own_attention_on():
    # query 0 reads patch 5, query 1 reads patches 0 and 15 equally; two heads
    reads = np.zeros((2, 2, 16), np.float32)
    reads[:, 0, 5] = 1
    reads[0, 1, 0] = reads[1, 1, 15] = 1
    patches = patch_weights(np.array([0.75, 0.25], np.float32), ProjectorConfig("resampler"), (4, 4), reads)
    expected = np.zeros(16)
    expected[[0, 5, 15]] = [0.125, 0.75, 0.125]
    np.testing.assert_allclose(patches.ravel(), expected)


def test_one_patch_lights_its_pixels_of_a_letterboxed_picture():
    # 200 x 100 fitted into 64 x 64: scale 0.32, 16 rows of padding above and below; patches of 16 pixels
    transform = ImageRule(height=64, width=64).transform((200, 100))
    patches = np.zeros((4, 4), np.float32)
    patches[1, 2] = 0.5
    heat = to_original(patches, transform)
    expected = np.zeros((100, 200))
    # model pixels x 32..48, y 16..32 are original x 100..150, y 0..50
    expected[0:50, 100:150] = 1
    np.testing.assert_array_equal(heat, expected)


def test_attention_on_the_padding_lights_nothing():
    transform = ImageRule(height=64, width=64).transform((200, 100))
    patches = np.zeros((4, 4), np.float32)
    patches[0] = 1
    assert to_original(patches, transform).max() == 0


def test_cropped_away_pixels_stay_dark():
    # the middle 100 x 100 of 200 x 100 is seen
    transform = ImageRule(height=64, width=64, mode="crop").transform((200, 100))
    heat = to_original(np.ones((4, 4), np.float32), transform)
    assert heat[:, 50:150].min() == 1 and heat[:, :50].max() == 0 and heat[:, 150:].max() == 0


def test_overlay_keeps_the_size_and_marks_the_place():
    heat = np.zeros((10, 20), np.float32)
    heat[2:4, 5:8] = 1
    shown = np.asarray(overlay(PIL.Image.new("RGB", (20, 10), "white"), heat)).astype(int)
    assert shown.shape == (10, 20, 3)
    assert shown[3, 6, 0] > shown[3, 6, 2] and shown[0, 0, 0] < shown[0, 0, 2]
