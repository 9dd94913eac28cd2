"""DeepSeek-VL, with SigLIP alone and with SAM beside it, and SAM's encoder, against transformers."""

import jax
import numpy as np
import pytest
from einops import rearrange

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.data.media_rule import Settings  # noqa: E402
from mm_jax.families.deepseek_vl import PairRule, SquareRule  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity.checks import (  # noqa: E402
    came_back,
    same_after_saving,
    same_features,
    same_gradients,
    same_greedy,
    same_logits,
)
from tests.parity.record import note  # noqa: E402

IMAGE = 96
LOW = theirs.VISION | dict(image_size=24, patch_size=8, num_hidden_layers=2)
HIGH = dict(
    hidden_size=24, output_channels=8, num_hidden_layers=3, num_attention_heads=3, image_size=40, patch_size=8,
    mlp_dim=36, window_size=3, global_attn_indexes=[1], layer_norm_eps=1e-4,
)  # fmt: skip


def build(directory, hybrid: bool, **text):
    vision = transformers.SiglipVisionConfig(**LOW)
    text = transformers.LlamaConfig(**theirs.TEXT | text)
    options = dict(vision_config=vision, text_config=text, image_token_id=IMAGE, tie_word_embeddings=False)
    if not hybrid:
        return theirs.build(
            transformers.DeepseekVLConfig(**options), directory, "DeepseekVLForConditionalGeneration"
        )
    options["high_res_vision_config"] = transformers.SamVisionConfig(**HIGH)
    config = transformers.DeepseekVLHybridConfig(**options)
    return theirs.build(config, directory, "DeepseekVLHybridForConditionalGeneration")


def prompts(hybrid: bool, images=((1,), (0, 5)), **options):
    places = [[(place, 1) for place in row] for row in images]
    arrays = theirs.pictured(places, IMAGE, 9, (24, 24), **options)
    if hybrid and "pixel_values" in arrays:
        shape = (len(arrays["pixel_values"]), 3, 40, 40)
        arrays["high_res_pixel_values"] = np.random.default_rng(9).normal(size=shape).astype(np.float32)
    return arrays


@pytest.mark.parametrize("hybrid", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_matches_transformers(hybrid, tmp_path):
    """One picture and several, padding on either side, none; greedy answers; the way back."""
    model = build(tmp_path / "in", hybrid)
    lm = mm_jax.load(tmp_path / "in")
    assert lm.config.image_tokens == 9
    right, left = prompts(hybrid), prompts(hybrid, pad_left=True)
    same_logits(model, lm, right)
    same_logits(model, lm, left)
    same_logits(model, lm, prompts(hybrid, ((), ())))
    same_greedy(model, lm, left)
    same_after_saving(model, lm, right, tmp_path / "out", type(model).__name__)
    same_gradients(model, lm, right, tmp_path / "gradients")


def test_hub_spelling(tmp_path):
    """Released files have the tower's name twice."""
    build(tmp_path, False)
    before = mm_jax.load(tmp_path)
    theirs.rename(tmp_path, lambda name: name.replace("vision_model.", "vision_model.vision_model."))
    after = mm_jax.load(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, before.params, after.params))


def test_pictures():
    """Both encoders' pictures of odd sizes, to the bit."""
    images = [picture for picture in hosts.pictures().values() if picture.mode == "RGB"]
    sizes = {"pixel_values": (24, 24), "high_res_pixel_values": (40, 40)}
    for family, kind, rule, settings in (
        ("deepseek_vl", "DeepseekVLImageProcessorPil", SquareRule, {}),
        (
            "deepseek_vl_hybrid",
            "DeepseekVLHybridImageProcessorPil",
            PairRule,
            dict(high_res_size={"height": 40, "width": 40}),
        ),
    ):
        settings |= dict(size={"height": 24, "width": 24}, min_size=3, image_mean=[0.5, 0.4, 0.3])
        processor = getattr(transformers, kind)(**settings)
        made = rule(Settings(image=processor.to_dict()), token_id=0, sizes=sizes, num_tokens=9).images(
            [np.asarray(image) for image in images]
        )
        for name, array in made.items():
            assert np.array_equal(array, processor(images=images, return_tensors="np")[name]), (kind, name)
        note(family, "preprocessing", True)


SAM = {
    "windows": {},
    "whole": dict(window_size=0, global_attn_indexes=[]),
    "plain": dict(use_rel_pos=False, use_abs_pos=False, qkv_bias=False, window_size=5),
}


@pytest.mark.parametrize("case", SAM)
def test_the_encoder_of_sam(case, tmp_path):
    """Windows that do not divide the map, relative positions in windows and in whole maps."""
    model = theirs.build(transformers.SamVisionConfig(**HIGH | SAM[case]), tmp_path / "in", "SamVisionModel")
    pixels = np.random.default_rng(0).normal(size=(2, 3, 40, 40)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    tower = mm_jax.load(tmp_path / "in")
    ours = np.asarray(jax.jit(tower.apply)(tower.params, tower.batch(pixel_values=pixels)))
    same_features(tower, ours, rearrange(expected, "n c h w -> n (h w) c"), 2e-5)
    came_back(tower, model, tmp_path / "out")
