"""Gemma-3 with pictures and PaliGemma against transformers, and what their two-way attention must keep."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import (  # noqa: E402
    compiled,
    same_after_saving,
    same_gradients,
    same_greedy,
    same_logits,
)

IMAGE = 96
TEXT = theirs.TEXT | dict(head_dim=12, num_hidden_layers=4)
SCALES = {"mm_input_projection": 4.0, "multi_modal_projector": 2.0, "embed_tokens": 0.4}
CASES = {
    "gemma3": (
        "Gemma3",
        dict(sliding_window=5, query_pre_attn_scalar=8,
             layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"]),
        dict(mm_tokens_per_image=4),
    ),
    "paligemma": ("Gemma", {}, dict(projection_dim=32)),
    "paligemma2": ("Gemma2", dict(sliding_window=5), dict(projection_dim=32)),
}  # fmt: skip


def build(case: str, directory, image: int = IMAGE):
    decoder, text, options = CASES[case]
    kind = "Gemma3" if case == "gemma3" else "PaliGemma"
    suffix = "TextConfig" if case == "gemma3" else "Config"
    config = getattr(transformers, f"{kind}Config")(
        vision_config=transformers.SiglipVisionConfig(
            **theirs.VISION, image_size=32, patch_size=8, vision_use_head=case == "gemma3"
        ),
        text_config=getattr(transformers, decoder + suffix)(**TEXT | text),
        image_token_index=image,
        **options,
    )
    return theirs.build(config, directory, f"{kind}ForConditionalGeneration", scales=SCALES)


def prompts(
    case: str, places=(((1, 1),), ((0, 1), (5, 1))), image: int = IMAGE, **options
) -> dict[str, np.ndarray]:
    """What the processor of the case gives: pictures in rows of different lengths, and which tokens are what."""
    each = 4 if case == "gemma3" else 16
    arrays = theirs.pictured(places, image, each, (32, 32), **options)
    kinds = (
        (arrays["input_ids"] == image).astype(int) if case == "gemma3" else np.zeros_like(arrays["input_ids"])
    )
    return arrays | {"token_type_ids": kinds}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "paligemma2" else ()) for case in CASES]
)
def test_matches_transformers(case, tmp_path):
    """One picture and several, padding on either side, no picture; greedy answers; gradients; the way back."""
    model = build(case, tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    assert lm.family == case.rstrip("2")
    right, left = prompts(case), prompts(case, pad_left=True)
    same_logits(model, lm, right)
    same_logits(model, lm, left)
    same_logits(model, lm, prompts(case, ((), ())))
    same_greedy(model, lm, left)
    same_gradients(model, lm, right, tmp_path / "gradients")
    kind = type(model).__name__
    same_after_saving(model, lm, right, tmp_path / "out", kind)


@pytest.mark.parametrize("case", ["paligemma", "paligemma2"])
def test_suffix(case, tmp_path):
    """Tokens of an answer are read in one direction."""
    model = build(case, tmp_path)
    lm = mm_jax.load(tmp_path)
    arrays = prompts(case)
    lengths = arrays["attention_mask"].sum(axis=1, keepdims=True)
    arrays["token_type_ids"] = (np.arange(arrays["input_ids"].shape[1]) >= lengths - 3).astype(int)
    same_logits(model, lm, arrays)


def test_a_token_that_is_no_word(tmp_path):
    model = build("paligemma", tmp_path, image=200)
    lm = mm_jax.load(tmp_path)
    arrays = prompts("paligemma")
    arrays["input_ids"] = np.where(arrays["input_ids"] == IMAGE, 200, arrays["input_ids"])
    same_logits(model, lm, arrays)


@pytest.mark.parametrize("case", ["gemma3", "paligemma2"])
def test_packed_rows(case, tmp_path):
    """Two conversations side by side in one row give what each gives alone: blocks end with their segment."""
    build(case, tmp_path)
    lm = mm_jax.load(tmp_path)
    batch = lm.batch(**prompts(case, (((4, 1),), ((0, 1), (5, 1)))))
    alone = np.asarray(compiled(lm)(lm.params, batch))
    lengths = batch["segment_ids"].sum(axis=1)
    packed = {}
    for name in ("tokens", "segment_ids", "positions", "media_index", "blocks"):
        packed[name] = np.concatenate([row[:n] for row, n in zip(batch[name], lengths, strict=True)])[None]
    second = np.arange(lengths.sum()) >= lengths[0]
    slots = batch["pixel_values"].shape[1] * lm.config.image_tokens
    index = packed["media_index"]
    packed["media_index"] = np.where(second & (index >= 0), index + slots, index)
    packed["segment_ids"] = 1 + second[None].astype(np.int32)
    packed["pixel_values"] = batch["pixel_values"].reshape(1, -1, *batch["pixel_values"].shape[2:])
    together = np.asarray(compiled(lm)(lm.params, {k: jnp.asarray(v) for k, v in packed.items()}))[0]
    assert np.abs(together[: lengths[0]] - alone[0, : lengths[0]]).max() < 1e-5
    assert np.abs(together[lengths[0] :] - alone[1, : lengths[1]]).max() < 1e-5


def test_hub_spelling_of_the_config(tmp_path):
    """Hub files of Gemma-3 have one base for each kind of layer under names of their own, and a pattern."""
    config = transformers.Gemma3TextConfig(
        **TEXT, sliding_window=5, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    )  # fmt: skip
    model = theirs.build(config, tmp_path)
    same_logits(model, mm_jax.load(tmp_path), theirs.rows(97))
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for name in ("rope_parameters", "layer_types"):
        del values[name]
    values |= dict(rope_theta=5000.0, rope_local_base_freq=500.0, sliding_window_pattern=3,
                   rope_scaling={"rope_type": "linear", "factor": 8.0}, cache_implementation="hybrid")  # fmt: skip
    path.write_text(json.dumps(values))
    same_logits(model, mm_jax.load(tmp_path), theirs.rows(97))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping"),
        (dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        (dict(layer_types=["linear_attention"] * 2), "layer_types"),
        (
            dict(rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
            "rope_parameters",
        ),
    ],
)
def test_refused(changes, message, tmp_path):
    theirs.build(transformers.Gemma3TextConfig(**theirs.TEXT | dict(head_dim=8)), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(mm_jax.UserError, match=message):
        mm_jax.load(tmp_path)
