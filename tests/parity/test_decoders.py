"""Text decoders against transformers."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file  # noqa: E402

import mm_jax  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import same_after_saving, same_gradients, same_greedy, same_logits  # noqa: E402
from tests.parity.record import note  # noqa: E402

AUTO = "AutoModelForCausalLM"
ROPE = {"rope_theta": 5000.0}
OPT = dict(ffn_dim=40, num_key_value_heads=None, intermediate_size=None)
SCALES = {"conv1d": 4.0}  # what a short convolution gives is normalised, and should be no noise
HYBRID = dict(
    num_hidden_layers=4, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=12,
)  # fmt: skip
# within 64 positions of the tiny models the blends of llama3 and yarn must have channels on both sides
CASES = {
    "llama": ("Llama", {}),
    "llama-full-heads": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-2, rope_parameters=ROPE)),
    "llama-tied-biases": (
        "Llama",
        dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16, hidden_act="gelu"),
    ),
    "llama-linear": ("Llama", dict(rope_parameters=ROPE | {"rope_type": "linear", "factor": 4.0})),
    "llama-dynamic": (
        "Llama",
        dict(rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=12),
    ),
    "llama-llama3": (
        "Llama",
        dict(
            rope_parameters=ROPE
            | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}
        ),
    ),
    "llama-yarn": (
        "Llama",
        dict(rope_parameters=ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ),
    "llama-yarn-options": (
        "Llama",
        dict(
            rope_parameters=ROPE
            | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0,
               "beta_slow": 0.5, "truncate": False, "mscale": 1.2, "mscale_all_dim": 0.7}
        ),
    ),
    "internlm3": ("InternLM3", dict(head_dim=16, attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral-window": ("Mistral", dict(sliding_window=5, head_dim=16, hidden_act="gelu_pytorch_tanh")),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True),
    ),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3-options": (
        "Qwen3",
        dict(head_dim=8, attention_bias=True, tie_word_embeddings=True, hidden_act="relu", use_sliding_window=True,
             sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    ),
    "qwen3_5_text": ("Qwen3_5Text", HYBRID),
    "qwen3_5_text-options": (
        "Qwen3_5Text",
        HYBRID
        | dict(num_hidden_layers=3, layer_types=["full_attention", "linear_attention", "linear_attention"],
               linear_num_key_heads=1, linear_conv_kernel_dim=3, attention_bias=True, tie_word_embeddings=True,
               rope_parameters=ROPE | {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5}),
    ),
    "opt": ("OPT", OPT),
    "opt-post-norm": (
        "OPT",
        OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=20, activation_function="gelu", pad_token_id=3),
    ),
    "opt-plain": (
        "OPT",
        OPT | dict(enable_bias=False, layer_norm_elementwise_affine=False, tie_word_embeddings=False),
    ),
    "gemma": ("Gemma", dict(head_dim=12, hidden_act="gelu")),
    "gemma2": (
        "Gemma2",
        dict(head_dim=12, sliding_window=4, query_pre_attn_scalar=7, attn_logit_softcapping=0.7,
             final_logit_softcapping=1.5, attention_bias=True),
    ),
    "gemma2-no-caps": (
        "Gemma2",
        dict(head_dim=8, layer_types=["full_attention", "sliding_attention"], sliding_window=3,
             attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False),
    ),
    "gemma3_text": (
        "Gemma3Text",
        dict(head_dim=12, sliding_window=4, query_pre_attn_scalar=7, final_logit_softcapping=2.0,
             layer_types=["sliding_attention", "full_attention"]),
    ),
    "opt-no-final-norm": ("OPT", OPT | dict(_remove_final_layer_norm=True)),
}  # fmt: skip


# what touches positions, masks or the cache
GREEDY = (
    "llama", "llama-dynamic", "llama-yarn-options", "mistral-window", "qwen2-window", "qwen3", "opt", "gemma2",
    "gemma3_text", "gemma", "internlm3", "qwen3_5_text",
)  # fmt: skip
# one of each family, the one with the most options
GRADIENTS = (
    "llama-tied-biases", "internlm3", "mistral-window", "qwen2-window", "qwen3-options", "opt-post-norm", "gemma",
    "gemma2", "gemma3_text", "qwen3_5_text", "qwen3_5_text-options",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    """Logits with padding on either side, 16 greedy tokens, gradients, and the way back."""
    name, options = CASES[case]
    config = getattr(transformers, f"{name}Config")(**theirs.TEXT | options)
    model = theirs.build(config, tmp_path / "in", scales=SCALES)
    lm = mm_jax.load(tmp_path / "in")
    assert lm.family == model.config.model_type and lm.config.dtype == "float32"
    left, right = theirs.rows(97, pad_left=True), theirs.rows(97)
    same_logits(model, lm, left)
    same_logits(model, lm, right)
    same_after_saving(model, lm, right, tmp_path / "out", AUTO)
    if case in GRADIENTS:
        same_gradients(model, lm, left, tmp_path / "gradients")
    if case in GREEDY:
        lm.max_length = 64  # the dynamic case is about texts over the config's length
        same_greedy(model, lm, left)
        ids = [lm.generate(lm.batch(**arrays), 16, ignore_eos=True) for arrays in (left, right)]
        assert np.array_equal(*ids)


def test_linear_attention_over_long_texts(tmp_path):
    """Over several of the pieces that are computed at once, ours and theirs."""
    # what linear attention gives is normalised: a larger eps keeps next to nothing from becoming as large as all
    # else; logits of about unit scale
    config = transformers.Qwen3_5TextConfig(**theirs.TEXT | HYBRID | dict(rms_norm_eps=1e-3))
    model = theirs.build(config, tmp_path / "in", scales={"lm_head": 0.5})
    lm = mm_jax.load(tmp_path / "in")
    rows = theirs.rows(97, lengths=(63, 150, 129), pad_left=True)
    same_logits(model, lm, rows)
    lm.max_length = 192
    same_greedy(model, lm, rows)


@pytest.mark.parametrize("kv_heads, bias", [(2, False), (1, True), (4, True)])
def test_internlm2(kv_heads, bias, tmp_path):
    """transformers has no class for it, but its numbers are those of a Llama with other names and fused weights."""
    rope = ROPE | {"rope_type": "dynamic", "factor": 2.0}
    options = dict(
        num_key_value_heads=kv_heads, attention_bias=bias, rope_parameters=rope, max_position_embeddings=12
    )
    model = theirs.build(transformers.LlamaConfig(**theirs.TEXT | options), tmp_path / "llama")
    as_internlm2(tmp_path / "llama", tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    assert lm.family == "internlm2"
    left = theirs.rows(97, pad_left=True)
    same_logits(model, lm, left)
    if kv_heads == 2:
        same_gradients(model, lm, left, tmp_path / "gradients", released=as_internlm2)
        lm.max_length = 64
        same_greedy(model, lm, left)  # the last: the reference keeps the base of the longest text
    mm_jax.save(lm, tmp_path / "out")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    assert after.keys() == before.keys() and all(np.array_equal(after[k], before[k]) for k in after)
    note(lm.family, "round trip", True)


def as_internlm2(directory, to) -> None:
    """The checkpoint of a Llama in the names of an InternLM2."""
    tensors = load_file(directory / "model.safetensors")
    values = theirs.as_internlm2(json.loads((directory / "config.json").read_text()), tensors)
    to.mkdir()
    (to / "config.json").write_text(json.dumps(values))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, to / "model.safetensors")
