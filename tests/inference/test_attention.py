"""Hand-made attention must light the right pixels."""

import numpy as np
import PIL.Image
import pytest

from mm_jax.data.example import TAPS, Example
from mm_jax.data.image import ImageRule, Transform
from mm_jax.errors import UserError
from mm_jax.inference.attention import (
    Look,
    area_of,
    feature_weights,
    looks,
    overlay,
    patch_weights,
    reading_weights,
    to_original,
    words_of,
)
from mm_jax.inference.text import answer_ids, render
from mm_jax.lm import LanguageModel
from mm_jax.models import ProjectorConfig
from tests.tiny import tiny, user


def example(image_index, taps=None) -> Example:
    index = np.array(image_index, np.int32)
    none = np.zeros(0, np.float32)
    return Example(index, none, index, index, index, index, none, none, none, taps=taps)


def test_features_take_the_weight_of_their_tokens():
    # text, picture 0 (2 tokens), picture 1 (2 tokens, the second one twice), a learned marker
    index = [-1, 0, 1, 2, 3, 3, -2]
    mean = np.array([0.1, 0.2, 0.3, 0.1, 0.05, 0.15, 0.1, 9, 9])  # two tokens of the answer behind
    np.testing.assert_allclose(feature_weights(mean, example(index)), [0.2, 0.3, 0.1, 0.2])
    assert feature_weights(mean, example([-1, -2])).size == 0


def test_a_mixture_shares_its_weight():
    distances, weights = np.zeros((2, TAPS), np.int32), np.zeros((2, TAPS), np.float32)
    distances[1, :2], weights[1, :2] = (0, 2), (0.75, 0.25)
    found = feature_weights(np.array([0.5, 0.4]), example([-1, 1], (distances, weights)))
    np.testing.assert_allclose(found, [0, 0.3, 0, 0.1])


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


def test_a_class_token_and_columns():
    tokens = np.array([9.0, 1, 2, 3, 4, 5, 6], np.float32)
    found = patch_weights(tokens, ProjectorConfig("linear"), (2, 3))
    np.testing.assert_allclose(found, [[1, 2, 3], [4, 5, 6]])
    found = patch_weights(tokens[1:], ProjectorConfig("mlp", order="columns"), (2, 3))
    np.testing.assert_allclose(found, [[1, 3, 5], [2, 4, 6]])


def test_queries_that_read_in_several_layers():
    """Two queries, three features. The second group swaps the queries, and reads feature 2 with both."""
    projector = ProjectorConfig("qformer", num_queries=2, num_layers=4, cross_every=2)

    def sown(first, second):  # [groups, N, heads, ...]
        return {"attention_weights": (np.array([[[first]], [[second]]], np.float32),)}

    same, swap, text = [[1, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 0]], [[0, 0, 1]] * 2  # a word stands behind
    layers = {
        "layer0": {
            "attention": sown([*same, [0, 0, 1]], [*swap, [0, 0, 1]]),
            "cross_attention": sown([[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 1]]),
        },
        "layer1": {"attention": sown([*same, [0, 0, 1]], [*text, [0, 0, 1]])},
    }
    # after the first layer [.5, 0, 0] and [0, .5, 0]; kept; swapped half: [.25, .25, 0] twice; read: [.125, .125, .5];
    # then half of what came from the word is nothing, for both alike
    found = reading_weights(projector, {"layers": layers})
    np.testing.assert_allclose(found, [[[[1 / 6, 1 / 6, 2 / 3]] * 2]], rtol=1e-6)


def test_a_reader_that_sees_its_own_queries():
    weights = np.array([[[[0.2, 0.2, 0.6, 0], [0.1, 0.3, 0.3, 0.3]]]], np.float32)
    sown = {"attention": {"attention_weights": (weights,)}}
    found = reading_weights(ProjectorConfig("latent", num_queries=2), sown)
    np.testing.assert_allclose(found, [[[[0.5, 0.5], [0.25, 0.75]]]], rtol=1e-6)


def heat_of(patches: np.ndarray, transform: Transform) -> np.ndarray:
    return to_original(Look(0, patches, area_of(transform)), transform.original)


def test_one_patch_lights_its_pixels_of_a_letterboxed_picture():
    # 200 x 100 fitted into 64 x 64: scale 0.32, 16 rows of padding above and below; patches of 16 pixels
    transform = ImageRule(height=64, width=64).transform((200, 100))
    patches = np.zeros((4, 4), np.float32)
    patches[1, 2] = 0.5
    heat = heat_of(patches, transform)
    expected = np.zeros((100, 200))
    # model pixels x 32..48, y 16..32 are original x 100..150, y 0..50
    expected[0:50, 100:150] = 1
    np.testing.assert_array_equal(heat, expected)


def test_attention_on_the_padding_lights_nothing():
    transform = ImageRule(height=64, width=64).transform((200, 100))
    patches = np.zeros((4, 4), np.float32)
    patches[0] = 1
    assert heat_of(patches, transform).max() == 0


def test_cropped_away_pixels_stay_dark():
    # the middle 100 x 100 of 200 x 100 is seen
    transform = ImageRule(height=64, width=64, mode="crop").transform((200, 100))
    heat = heat_of(np.ones((4, 4), np.float32), transform)
    assert heat[:, 50:150].min() == 1 and heat[:, :50].max() == 0 and heat[:, 150:].max() == 0


def test_overlay_keeps_the_size_and_marks_the_place():
    heat = np.zeros((10, 20), np.float32)
    heat[2:4, 5:8] = 1
    shown = np.asarray(overlay(PIL.Image.new("RGB", (20, 10), "white"), heat)).astype(int)
    assert shown.shape == (10, 20, 3)
    assert shown[3, 6, 0] > shown[3, 6, 2] and shown[0, 0, 0] < shown[0, 0, 2]


@pytest.fixture(scope="module", params=[False, True], ids=["mlp", "resampler"])
def lm(request):
    return LanguageModel(*tiny(resampler=request.param))


def test_words_cover_the_answer(lm):
    ids = lm.processor.tokenizer.encode("a blue circle")
    assert [word.text for word in words_of(lm.processor, ids)] == ["a", "blue", "circle"]
    prompt = lm.prompt([user("what colour", (0,))])
    for seed in range(4):
        batch = lm.batch([user("what colour", (0,))])
        answer = lm.generate(batch, 40, temperature=1.5, seed=seed)[0]
        ids = answer_ids(answer, lm.stop_ids)
        text = render(lm.processor.parts(ids, prompt.transforms))
        words = words_of(lm.processor, ids, prompt.transforms)
        assert all(text[word.start : word.end] == word.text for word in words)
        assert "".join(text.split()) == "".join("".join(word.text.split()) for word in words)
        covered = [k for word in words for k in range(len(ids))[word.tokens]]
        assert covered == list(range(len(ids)))


def test_boxes_are_words(lm):
    processor = lm.processor
    prompt = lm.prompt([user("what colour", (0,))])
    from mm_jax.data.messages import Box, Conversation, Message, Text

    answer = Message("assistant", (Text("blue"), Box((4, 4, 15, 15)), Text(" red")))
    whole = processor.example(Conversation((user("what colour", (0,)), answer)))
    ids = answer_ids(whole.tokens[prompt.length :], lm.stop_ids)
    words = words_of(processor, ids, prompt.transforms)
    assert [word.text[:1] for word in words] == ["b", "[", "r"] and words[1].text.count(",") == 3


def test_looks_add_up_to_the_attention_that_the_pictures_get(lm):
    messages = [user("what colour", (0, 1))]
    ids = lm.generate(lm.batch(messages), 5, ignore_eos=True)[0]
    prompt, weights = lm.attention(messages, ids)
    words = [slice(0, 2), slice(4, 5)]
    found = looks(lm, prompt, ids, words)
    for word, pictures in zip(words, found, strict=True):
        rows = weights["decoder"][:, :, prompt.length - 1 + word.start : prompt.length - 1 + word.stop]
        mean = rows.mean(axis=(0, 1, 2))[: prompt.length]
        for k, look in enumerate(pictures):
            here = (prompt.image_index >= 4 * k) & (prompt.image_index < 4 * k + 4)
            assert look.weights.shape == (4, 4) and look.image == k
            np.testing.assert_allclose(look.weights.sum(), mean[here].sum(), rtol=1e-5)
            # 40 x 24 is 32 x 19 in the middle of 32 x 32: 6 rows above it, of 24 / 19 original pixels each
            np.testing.assert_allclose(look.area, (0, -6 * 24 / 19, 40, 26 * 24 / 19), atol=1e-4)
    assert not np.allclose(found[0][0].weights, found[1][0].weights)
    with pytest.raises(UserError, match="no such word"):
        looks(lm, prompt, ids, [slice(9, 10)])
