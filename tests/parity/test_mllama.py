"""Llama-3.2-Vision against transformers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.mllama import processing_mllama as processing  # noqa: E402
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil  # noqa: E402

import mm_jax  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import (  # noqa: E402
    same_after_saving,
    same_gradients,
    same_greedy,
    same_logits,
)
from tests.parity.hosts import picture  # noqa: E402

IMAGE = 97  # the first row of the embedding behind the vocabulary
KIND = "MllamaForConditionalGeneration"
TEXT = theirs.TEXT | dict(bos_token_id=1, num_hidden_layers=4, cross_attention_layers=[1, 3])
VISION = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=3, num_global_layers=2, attention_heads=3,
              image_size=16, patch_size=8, intermediate_layers_indices=[0, 2], vision_output_dim=72)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
CASES = {
    # a period of two layers, repeated
    "mllama": (dict(rope_parameters=LLAMA3), {}),
    # no period but the whole; all heads; one picture size of two tiles; no taps
    "irregular": (
        dict(num_hidden_layers=3, cross_attention_layers=[0], num_key_value_heads=4),
        dict(max_num_tiles=2, supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]], intermediate_layers_indices=[1],
             vision_output_dim=48, image_size=24, hidden_act="gelu_pytorch_tanh", norm_eps=1e-3),
    ),
}  # fmt: skip
SCALES = {"embedding.weight": 3.0, "v_proj": 2.0, "o_proj": 2.0}


def build(case: str, directory):
    text, vision = CASES[case]
    config = transformers.MllamaConfig(
        text_config=TEXT | text, vision_config=VISION | vision, image_token_index=IMAGE
    )
    model = theirs.build(config, directory, KIND, scales=SCALES)
    return model, processor(VISION | vision)


def processor(vision):
    size, tiles = vision["image_size"], vision.get("max_num_tiles", 4)
    return MllamaImageProcessorPil(size={"height": size, "width": size}, max_image_tiles=tiles)


def prompts(pixels, places=((1,), (0, 1, 7)), pad_left=False) -> dict[str, np.ndarray]:
    """Rows of different lengths with a picture before each of these text tokens, as the reference's processor has
    them; pictures are of different shapes."""
    rows = tuple(tuple((place, 1) for place in row) for row in places)
    arrays = theirs.pictured(rows, IMAGE, 1, (1, 1), pad_left=pad_left)
    arrays = {name: arrays[name] for name in ("input_ids", "attention_mask")}
    sizes = iter([(30, 16), (9, 40), (20, 20), (64, 64), (13, 50), (16, 16)] * 2)
    images = [[np.array(picture(*next(sizes))) for _ in row] for row in places]
    if not any(images):
        return arrays
    made = pixels(images, return_tensors="np")
    tiles = made.pop("num_tiles")
    ids = arrays["input_ids"].tolist()
    dense = processing.convert_sparse_cross_attention_mask_to_dense(
        [processing.get_cross_attention_token_mask(row, IMAGE) for row in ids],
        tiles, pixels.max_image_tiles, len(ids[0]),
    )  # fmt: skip
    return arrays | dict(made) | {"cross_attention_mask": dense}


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    """Several pictures, side by side and apart; rows with fewer or none; padding on either side; text alone; greedy
    answers; the way back."""
    model, pixels = build(case, tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    assert lm.family == "mllama"
    right, left = prompts(pixels), prompts(pixels, pad_left=True)
    errors = [same_logits(model, lm, arrays) for arrays in (right, left, prompts(pixels, ((), (0, 4, 5))))]
    errors.append(same_logits(model, lm, theirs.rows(97)))
    print(errors)
    same_after_saving(model, lm, right, tmp_path / "out", KIND)


def test_gradients(tmp_path):
    model, pixels = build("mllama", tmp_path / "in")
    same_gradients(model, mm_jax.load(tmp_path / "in"), prompts(pixels), tmp_path / "out")


def test_greedy(tmp_path):
    model, pixels = build("mllama", tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    same_greedy(model, lm, prompts(pixels, pad_left=True))
