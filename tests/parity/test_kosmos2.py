"""Kosmos-2 against transformers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.data.pixels import PixelRule  # noqa: E402
from mm_jax.families.llava import IMAGE_PROCESSOR  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity.checks import same_after_saving, same_gradients, same_greedy, same_logits  # noqa: E402

IMAGE, QUERIES = 96, 5
MASK = "image_embeds_position_mask"
KIND = "Kosmos2ForConditionalGeneration"
TEXT = dict(vocab_size=97, embed_dim=32, layers=2, ffn_dim=44, attention_heads=4, max_position_embeddings=64,
            eos_token_id=None, bos_token_id=None)  # fmt: skip
SCALES = {"latent_query": 3.0, "x_attn": 3.0, "dense": 4.0, "embed_tokens": 0.3}
CASES = {
    "kosmos-2": ({}, {}),
    "options": (
        dict(scale_embedding=False, activation_function="relu", layer_norm_eps=1e-3, attention_heads=2),
        dict(tie_word_embeddings=False),
    ),
}


def build(case: str, directory):
    text, options = CASES[case]
    config = transformers.Kosmos2Config(
        text_config=TEXT | text | options,
        vision_config=theirs.VISION | dict(image_size=24, patch_size=8),
        latent_query_num=QUERIES,
        **options,
    )
    return theirs.build(config, directory, KIND, scales=SCALES)


def prompts(places=(((1, 1),), ((0, 1), (5, 1))), **options) -> dict[str, np.ndarray]:
    """As the reference's processor has them: positions count the tokens that are no padding, whose id is 1."""
    arrays = theirs.pictured(places, IMAGE, QUERIES, (24, 24), **options)
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    arrays[MASK] = (ids == IMAGE).astype(np.int64)
    arrays["input_ids"] = np.where(ids == IMAGE, 4, np.where(mask, ids, 1))
    return arrays


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    """One picture and several, padding on either side; greedy answers; gradients; the way back."""
    model = build(case, tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    assert lm.family == "kosmos-2" and lm.config.image_tokens == QUERIES
    right, left = prompts(), prompts(pad_left=True)
    same_logits(model, lm, right)
    same_logits(model, lm, left)
    same_greedy(model, lm, left)
    same_gradients(model, lm, right, tmp_path / "gradients")
    same_after_saving(model, lm, right, tmp_path / "out", KIND)


def test_settings_of_the_released_file():
    """Pictures are stretched to a square, which an old field says that no other model's file has."""
    settings = dict(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}, use_square_size=True
    )
    processor = transformers.CLIPImageProcessorPil(**settings)
    rule = PixelRule.read(settings, IMAGE_PROCESSOR)
    for size in ((60, 31), (31, 60)):
        image = hosts.picture(*size)
        (expected,) = processor(image, return_tensors="np")["pixel_values"]
        assert np.array_equal(rule(np.asarray(image)).transpose(2, 0, 1), expected)


def test_text_alone(tmp_path):
    """The reference has no such call; its decoder has."""
    model = build("kosmos-2", tmp_path)
    rows = theirs.rows(97)
    rows["input_ids"] = np.where(rows["attention_mask"], rows["input_ids"], 1)
    same_logits(model.text_model, mm_jax.load(tmp_path), rows)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda a: a | {"image_embeds_position_mask": a["image_embeds_position_mask"][:, 1:]},
            "position_mask has shape",
        ),
        (lambda a: {k: v for k, v in a.items() if k != "pixel_values"}, "15 image tokens.*no pixel_values"),
        (lambda a: a | {"pixel_values": a["pixel_values"][:1]}, "1 images take 5 tokens"),
    ],
)
def test_wrong_batches(change, message, tmp_path):
    build("kosmos-2", tmp_path)
    with pytest.raises(mm_jax.UserError, match=message):
        mm_jax.load(tmp_path).batch(**change(prompts()))
