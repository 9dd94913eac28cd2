"""Decoders with a mixture of experts against transformers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import same_after_saving, same_gradients, same_greedy, same_logits  # noqa: E402

EXPERTS = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20, head_dim=16)
CASES = {
    "plain": dict(norm_topk_prob=True),
    "options": dict(
        norm_topk_prob=False,
        tie_word_embeddings=True,
        attention_bias=True,
        hidden_act="gelu",
        num_experts_per_tok=1,
        use_sliding_window=True,
        sliding_window=5,
    ),
}


def build(directory, **options):
    config = transformers.Qwen3MoeConfig(**theirs.TEXT | EXPERTS | options)
    return theirs.build(config, directory)


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    model = build(tmp_path / "in", **CASES[case])
    lm = mm_jax.load(tmp_path / "in")
    assert lm.family == "qwen3_moe" and lm.config.decoder.experts.num_chosen == (3 if case == "plain" else 1)
    left = theirs.rows(97, pad_left=True)
    same_logits(model, lm, left)
    same_greedy(model, lm, left)
    same_gradients(model, lm, theirs.rows(97, seed=1), tmp_path / "gradients")
    same_after_saving(model, lm, left, tmp_path / "out", "AutoModelForCausalLM")


def test_a_token_alone(tmp_path):
    """No token is dropped or moved by those beside it: a row alone and in a batch give the same."""
    build(tmp_path)
    lm = mm_jax.load(tmp_path)
    arrays = theirs.rows(97, lengths=(9, 9, 9))
    together = np.asarray(lm.apply(lm.params, lm.batch(**arrays)))
    alone = np.asarray(lm.apply(lm.params, lm.batch(**{k: v[1:2] for k, v in arrays.items()})))
    assert np.abs(together[1] - alone[0]).max() < 1e-5


def test_layers_without_experts_are_refused(tmp_path):
    build(tmp_path, mlp_only_layers=[0])
    with pytest.raises(mm_jax.UserError, match="every layer has experts here"):
        mm_jax.load(tmp_path)
