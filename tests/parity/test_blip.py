"""BLIP-2, InstructBLIP and their towers against transformers."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import (  # noqa: E402
    came_back,
    compiled,
    same_after_saving,
    same_features,
    same_gradients,
    same_greedy,
    same_logits,
)

IMAGE = 96
QUERIES = 5
OPT = dict(ffn_dim=40, num_key_value_heads=None, intermediate_size=None, pad_token_id=1)
QFORMER = dict(vocab_size=61, hidden_size=36, num_hidden_layers=4, num_attention_heads=3, intermediate_size=44,
               max_position_embeddings=20, layer_norm_eps=1e-3)  # fmt: skip
# so that pictures and instructions move the logits by their own scale
SCALES = {"qformer": 5.0, "query_tokens": 5.0, "vision_model": 2.0, "language_projection": 3.0}
CASES = {
    "blip-2": ("Blip2", "OPT", OPT, QFORMER, {}),
    "blip-2-every-layer": (
        "Blip2",
        "OPT",
        OPT | dict(do_layer_norm_before=False),
        QFORMER
        | dict(cross_attention_frequency=1, num_hidden_layers=2, hidden_act="relu", use_qformer_text_input=True),
        dict(qkv_bias=False),
    ),
    "instructblip": ("InstructBlip", "Llama", dict(num_key_value_heads=4), QFORMER, dict(layer_norm_eps=1e-3)),
    "instructblip-every-third": (
        "InstructBlip",
        "OPT",
        OPT,
        QFORMER | dict(cross_attention_frequency=3, num_hidden_layers=6),
        dict(image_size=16),
    ),
}  # fmt: skip


def build(case: str, directory):
    name, decoder, text, qformer, vision = CASES[case]
    config = getattr(transformers, f"{name}Config")(
        vision_config=theirs.VISION | dict(image_size=24, patch_size=8) | vision,
        qformer_config=qformer,
        text_config=getattr(transformers, f"{decoder}Config")(**theirs.TEXT | text).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    return theirs.build(config, directory, f"{name}ForConditionalGeneration", scales=SCALES)


def prompts(case: str, pad_left: bool = False, images=((0,), (0, 4)), seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of different lengths with their pictures before these text tokens, and an instruction for each picture."""
    places = [[(place, 1) for place in row] for row in images]
    size = CASES[case][4].get("image_size", 24)
    arrays = theirs.pictured(places, IMAGE, QUERIES, (size, size), pad_left=pad_left, seed=seed)
    random = np.random.default_rng(seed)
    count = len(arrays["pixel_values"])
    if case.startswith("instruct"):
        lengths = random.integers(2, 9, count)
        arrays["qformer_attention_mask"] = (np.arange(10) < lengths[:, None]).astype(np.int64)
        arrays["qformer_input_ids"] = random.integers(1, 61, (count, 10))
    return arrays


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "blip-2" else pytest.mark.slow) for case in CASES]
)
def test_matches_transformers(case, tmp_path):
    """One picture and several, padding on either side; greedy answers; gradients; the way back."""
    kind = f"{CASES[case][0]}ForConditionalGeneration"
    model = build(case, tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    assert lm.family == model.config.model_type and lm.config.image_tokens == QUERIES
    right, left = prompts(case), prompts(case, pad_left=True)
    same_logits(model, lm, right)
    same_logits(model, lm, left)
    if case in ("blip-2", "instructblip"):
        same_greedy(model, lm, left)
        same_gradients(model, lm, left, tmp_path / "gradients")
    same_after_saving(model, lm, right, tmp_path / "out", kind)


@pytest.mark.parametrize("case", ["blip-2", "instructblip"])
def test_text_alone(case, tmp_path):
    """The reference has no such call; its decoder has."""
    model = build(case, tmp_path)
    same_logits(model.language_model, mm_jax.load(tmp_path), theirs.rows(IMAGE))


def test_instructions_change_the_answer(tmp_path):
    """And their padding does not, nor how many pictures are beside."""
    build("instructblip", tmp_path)
    lm = mm_jax.load(tmp_path)
    both = prompts("instructblip")
    apply = compiled(lm)
    before = np.asarray(apply(lm.params, lm.batch(**both)))
    ids, mask = both["qformer_input_ids"], both["qformer_attention_mask"]
    padding = both | {"qformer_input_ids": np.where(mask, ids, 7)}
    assert np.array_equal(before, apply(lm.params, lm.batch(**padding)))
    other = both | {"qformer_input_ids": np.where(mask, (ids + 1) % 61, ids)}
    after = np.asarray(apply(lm.params, lm.batch(**other)))
    pictured = both["attention_mask"].astype(bool)
    assert np.abs(before - after)[pictured].max() > 0.03
    second = {k: v[1:] if len(v) == 2 else v[-2:] for k, v in both.items()}  # a row with two pictures
    alone = np.asarray(apply(lm.params, lm.batch(**second)))
    assert np.abs(alone[0] - before[1]).max() < 1e-4


@pytest.mark.parametrize("name", ["Blip2", "InstructBlip"])
def test_towers(name, tmp_path):
    config = getattr(transformers, f"{name}VisionConfig")(**theirs.VISION, image_size=28, patch_size=14)
    model = theirs.build(config, tmp_path, f"{name}VisionModel")
    pixels = np.random.default_rng(0).normal(size=(3, 3, 28, 28)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    for spelling in ("", "vision_model."):
        theirs.rename(tmp_path, lambda tensor, spelling=spelling: spelling + tensor)
        tower = mm_jax.load(tmp_path)
        ours = np.asarray(jax.jit(tower.apply)(tower.params, tower.batch(pixel_values=pixels)))
        same_features(tower, ours, expected)
    came_back(tower, model, tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(text_config={"model_type": "t5"}), 'the text_config is of "t5", an encoder-decoder'),
        (dict(qformer_config={"num_hidden_layers": 3}), "a multiple of cross_attention_frequency"),
        (dict(qformer_config={"position_embedding_type": "relative_key"}), "position_embedding_type"),
        (dict(vision_config={"hidden_act": "mish"}), "hidden_act"),
    ],
)
def test_refused(change, message, tmp_path):
    build("blip-2", tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {k: values[k] | v for k, v in change.items()}))
    with pytest.raises(mm_jax.UserError, match=message):
        mm_jax.load(tmp_path)


def test_wrong_instructions(tmp_path):
    build("instructblip", tmp_path)
    lm = mm_jax.load(tmp_path)
    arrays = prompts("instructblip")
    with pytest.raises(mm_jax.UserError, match="qformer_input_ids"):
        lm.batch(**{k: v for k, v in arrays.items() if k != "qformer_input_ids"})
    with pytest.raises(mm_jax.UserError, match="one row for each of the 3 pictures"):
        lm.batch(**arrays | {k: arrays[k][:2] for k in arrays if k.startswith("qformer")})
    with pytest.raises(mm_jax.UserError, match="at most 20 tokens from 0 to 60"):
        lm.batch(**arrays | {"qformer_input_ids": arrays["qformer_input_ids"] + 60})
