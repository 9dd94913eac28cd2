"""Vision towers against transformers."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import came_back, same_features  # noqa: E402

CASES = {
    "clip": ("CLIPVision", dict(image_size=28, patch_size=14, layer_norm_eps=1e-3)),
    "clip-gelu": ("CLIPVision", dict(image_size=24, patch_size=8, hidden_act="gelu", num_attention_heads=2)),
    "siglip": ("SiglipVision", dict(image_size=24, patch_size=8)),
    "siglip-no-head": ("SiglipVision", dict(image_size=16, patch_size=8, vision_use_head=False)),
}


DINO = dict(
    image_size=28, patch_size=7, num_hidden_layers=2, num_attention_heads=3, hidden_size=24, mlp_ratio=2
)
DINOS = {
    "dinov2": ("Dinov2", DINO),
    "dinov2-swiglu": ("Dinov2", DINO | dict(use_swiglu_ffn=True, qkv_bias=False, layer_norm_eps=1e-3)),
    "dinov2-registers": ("Dinov2WithRegisters", DINO | dict(num_register_tokens=3, hidden_act="relu")),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    """Features, tensors that we leave aside included on the way back, and both spellings of the names."""
    name, options = CASES[case]
    config = getattr(transformers, f"{name}Config")(**theirs.VISION | options)
    model = theirs.build(config, tmp_path / "in", f"{name}Model")
    size = options["image_size"]
    pixels = np.random.default_rng(0).normal(size=(3, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    for spelling in ("as saved", "as on the hub"):
        if spelling == "as on the hub":
            theirs.rename(tmp_path / "in", lambda tensor: f"vision_model.{tensor}")
        tower = mm_jax.load(tmp_path / "in")
        ours = np.asarray(jax.jit(tower.apply)(tower.params, tower.batch(pixel_values=pixels)))
        same_features(tower, ours, expected)
    came_back(tower, model, tmp_path / "out")


@pytest.mark.parametrize("case", DINOS)
def test_dinov2(case, tmp_path):
    """Pictures of the table's size, larger, smaller, wider than high, and not of whole patches."""
    name, options = DINOS[case]
    model = theirs.build(getattr(transformers, f"{name}Config")(**options), tmp_path / "in", f"{name}Model")
    tower = mm_jax.load(tmp_path / "in")
    for height, width in ((28, 28), (42, 42), (14, 35), (30, 27)):
        pixels = np.random.default_rng(height).normal(size=(2, 3, height, width)).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
        ours = np.asarray(tower.apply(tower.params, tower.batch(pixel_values=pixels)))
        same_features(tower, ours, expected)
    came_back(tower, model, tmp_path / "out")


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_towers_of_two_tower_checkpoints(name, tmp_path):
    """The picture tower of a checkpoint that has one of texts too, which is kept."""
    text = dict(vocab_size=20, max_position_embeddings=8, hidden_size=24, intermediate_size=24, num_hidden_layers=1,
                num_attention_heads=2)  # fmt: skip
    vision = dict(theirs.VISION, image_size=24, patch_size=8)
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision)
    model = theirs.build(config, tmp_path / "in", f"{name}Model")
    pixels = np.random.default_rng(0).normal(size=(2, 3, 24, 24)).astype(np.float32)
    with torch.no_grad():
        expected = model.vision_model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    tower = mm_jax.load(tmp_path / "in")
    ours = np.asarray(tower.apply(tower.params, tower.batch(pixel_values=pixels)))
    same_features(tower, ours, expected)
    came_back(tower, model, tmp_path / "out")


def test_a_wrong_picture(tmp_path):
    config = transformers.CLIPVisionConfig(**theirs.VISION, image_size=28, patch_size=14)
    theirs.build(config, tmp_path, "CLIPVisionModel")
    tower = mm_jax.load(tmp_path)
    with pytest.raises(mm_jax.UserError, match=r"\[1, 3, 14, 28\].*\[pictures, 3, 28, 28\]"):
        tower.batch(pixel_values=np.zeros((1, 3, 14, 28), np.float32))
    with pytest.raises(mm_jax.UserError, match="pixel_values alone, not input_ids"):
        tower.batch(input_ids=np.zeros((1, 3), np.int32))
