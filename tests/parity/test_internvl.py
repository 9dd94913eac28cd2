"""InternVL and InternViT against transformers, in its files and in OpenGVLab's own."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file  # noqa: E402

import mm_jax  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import (  # noqa: E402
    came_back,
    same_after_saving,
    same_features,
    same_gradients,
    same_greedy,
    same_logits,
)
from tests.parity.record import note  # noqa: E402

KIND = "InternVLForConditionalGeneration"
IMAGE = 96
VISION = theirs.VISION | dict(image_size=[32, 32], patch_size=[8, 8], num_hidden_layers=2)
LARGE = dict(use_qk_norm=True, norm_type="rms_norm")  # as the tower with 6 billion parameters
SMALL = dict(attention_bias=True)  # as the one with 300 million
CASES = {
    "large-qwen2": (LARGE, "Qwen2", {}, {}),
    "small-llama": (SMALL, "Llama", {}, dict(vision_feature_layer=-2, projector_hidden_act="relu")),
    "norm-internlm3": (
        dict(use_mean_pooling=False, use_absolute_position_embeddings=False, use_mask_token=True),
        "InternLM3",
        dict(head_dim=16),
        dict(downsample_ratio=0.25),
    ),
    "tied": (SMALL, "Qwen2", dict(tie_word_embeddings=True), dict(tie_word_embeddings=True)),
}


def build(case: str, directory):
    vision, decoder, text, options = CASES[case]
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**VISION | vision),
        text_config=getattr(transformers, f"{decoder}Config")(**theirs.TEXT | text),
        image_token_id=IMAGE,
        **dict(tie_word_embeddings=False) | options,
    )
    return theirs.build(config, directory, KIND)


def prompts(each: int, images=((1,), (0, 5)), **options):
    places = [[place if isinstance(place, tuple) else (place, 1) for place in row] for row in images]
    return theirs.pictured(places, IMAGE, each, (32, 32), **options)


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    """One picture and several, one of several tiles, padding on either side, none; greedy answers; the way back."""
    model = build(case, tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    each = 1 if case == "norm-internlm3" else 4
    assert lm.family == "internvl" and lm.config.image_tokens == each
    right, left = prompts(each), prompts(each, pad_left=True)
    same_logits(model, lm, right)
    same_logits(model, lm, left)
    if case == "large-qwen2":
        same_logits(model, lm, prompts(each, ((), ())))
        same_logits(model, lm, prompts(each, ((), ((4, 3), 2))))  # one of three tiles
        same_greedy(model, lm, left)
    if case in ("large-qwen2", "norm-internlm3"):
        same_gradients(model, lm, right, tmp_path / "gradients")
    same_after_saving(model, lm, right, tmp_path / "out", KIND)


TOWERS = {"large": LARGE, "small": SMALL, "norm": dict(use_mean_pooling=False, layer_scale_init_value=1.0)}


@pytest.mark.parametrize("case", TOWERS)
def test_the_tower_alone(case, tmp_path):
    config = transformers.InternVLVisionConfig(**VISION | TOWERS[case])
    model = theirs.build(config, tmp_path / "in", "InternVLVisionModel")
    pixels = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert 0.1 < expected.std() < 10
    towers = [mm_jax.load(tmp_path / "in")]
    if case != "norm":
        as_released(tmp_path / "in", tmp_path / "released")
        towers.append(mm_jax.load(tmp_path / "released"))
    for tower in towers:
        ours = np.asarray(jax.jit(tower.apply)(tower.params, tower.batch(pixel_values=pixels)))
        same_features(tower, ours, expected, 2e-5)
    came_back(towers[0], model, tmp_path / "out")


@pytest.mark.parametrize("case", ["large-qwen2", "small-llama"])
@pytest.mark.parametrize("decoder", ["same", "internlm2"])
def test_released_files(case, decoder, tmp_path):
    """OpenGVLab's names and config give the same model, and come back bit for bit."""
    if decoder == "internlm2" and case != "small-llama":
        pytest.skip("InternLM2 has Llama's numbers")
    model = build(case, tmp_path / "in")
    as_released(tmp_path / "in", tmp_path / "released", decoder)
    lm = mm_jax.load(tmp_path / "released")
    assert lm.family == "internvl_chat"
    expected = mm_jax.load(tmp_path / "in")
    assert same_params(lm, expected)
    if case == "large-qwen2":
        same_logits(model, lm, prompts(4))
        same_greedy(model, lm, prompts(4, pad_left=True))
        same_gradients(model, lm, prompts(4), tmp_path / "gradients", released=as_released)
    mm_jax.save(lm, tmp_path / "out")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("released", "out"))
    assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)
    note(lm.family, "round trip", True)


def test_the_first_pixel_shuffle(tmp_path):
    """Version 1 gives the same tokens column by column."""
    build("large-qwen2", tmp_path / "in")
    as_released(tmp_path / "in", tmp_path / "released")
    encoded = []
    for version in ("v2", "v1"):
        path = tmp_path / "released" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ps_version": version}))
        lm = mm_jax.load(tmp_path / "released")
        batch = lm.batch(**prompts(4, ((1,),)))
        encoded.append(lm.model.apply({"params": lm.params}, batch, method="encode")[0])
    grid, turned = (np.asarray(x).reshape(2, 2, -1) for x in encoded)
    assert np.array_equal(grid.swapaxes(0, 1), turned) and not np.array_equal(grid, turned)


def same_params(one, two) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), one.params, two.params))


def as_released(directory, to, decoder: str = "same") -> None:
    """A checkpoint of transformers in the names of OpenGVLab's own files; `decoder` internlm2 makes one of a Llama."""
    config = json.loads((directory / "config.json").read_text())
    alone = "vision_config" not in config
    vision = config if alone else config["vision_config"]
    tensors = load_file(directory / "model.safetensors")
    tensors = {tower_name(name, alone): value for name, value in tensors.items()}
    fuse(tensors, ".attn.{}_proj", ".attn.qkv", lambda q, k, v: np.concatenate([q, k, v]))
    released = {
        "model_type": "intern_vit_6b",
        "initializer_factor": vision["layer_scale_init_value"],
        "qkv_bias": vision["attention_bias"],
        "qk_normalization": vision["use_qk_norm"],
        "image_size": vision["image_size"][0],
        "patch_size": vision["patch_size"][0],
        **{k: vision[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
        **{k: vision[k] for k in ("hidden_act", "norm_type", "layer_norm_eps")},
        # leftovers of the real files
        "drop_path_rate": 0.1, "use_flash_attn": True, "use_bfloat16": True, "use_moe": False, "num_experts": 8,
    }  # fmt: skip
    if not alone:
        names = {
            "qwen2": "Qwen2ForCausalLM",
            "llama": "LlamaForCausalLM",
            "internlm3": "InternLM3ForCausalLM",
        }
        llm = config["text_config"] | {"architectures": [names[config["text_config"]["model_type"]]]}
        if decoder == "internlm2":
            llm = theirs.as_internlm2(llm, tensors, "language_model.") | {
                "architectures": ["InternLM2ForCausalLM"]
            }
        activation = config["projector_hidden_act"]
        released = {
            "model_type": "internvl_chat",
            "vision_config": released,
            "llm_config": llm | {"use_bfloat16": True, "top_k": 50, "moe_config": None},
            "img_context_token_id": IMAGE,
            "downsample_ratio": config["downsample_ratio"],
            "select_layer": config["vision_feature_layer"],
            "ps_version": "v2",
            "force_image_size": 32,
            "max_dynamic_patch": 12, "min_dynamic_patch": 1, "template": "internvl2_5", "use_backbone_lora": 0,
        }  # fmt: skip
        assert activation in ("gelu", "relu")
    to.mkdir()
    (to / "config.json").write_text(json.dumps(released))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, to / "model.safetensors")


def tower_name(name: str, alone: bool) -> str:
    if not alone and not name.startswith("vision_tower."):
        for one, two in (("layer_norm", "0"), ("linear_1", "1"), ("linear_2", "3")):
            name = name.replace(f"multi_modal_projector.{one}", f"mlp1.{two}")
        return name
    for one, two in (
        ("vision_tower.", "vision_model."), ("cls_token", "class_embedding"),
        ("patch_embeddings.projection", "patch_embedding"), ("position_embeddings", "position_embedding"),
        ("encoder.layer.", "encoder.layers."), ("attention.", "attn."), ("projection_layer", "proj"),
        ("lambda_", "ls"), ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
    ):  # fmt: skip
        name = name.replace(one, two)
    return name


def fuse(tensors, parts: str, whole: str, join) -> None:
    """Three tensors of each block become one."""
    first = parts.format("q")
    for name in [n for n in tensors if first in n]:
        found = [tensors.pop(name.replace(first, parts.format(part))) for part in "qkv"]
        tensors[name.replace(first, whole)] = join(*found)
