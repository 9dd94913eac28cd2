"""Sampling against distributions written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.errors import UserError
from mm_jax.inference.sampling import Controls, Sampling, Tables, adjusted_logits, mask_words, sample

PROBABILITIES = np.array([0.1, 0.5, 0.25, 0.15], np.float32)
LOGITS = np.log(PROBABILITIES)


def distribution(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    return np.asarray(jax.nn.softmax(adjusted_logits(jnp.asarray(LOGITS), temperature, top_k, top_p, min_p)))


def choose(logits, settings, *, tables=None, allowed=None, positions=None, **flags):
    """`sample` of rows of logits; settings: one `Sampling` a row."""
    logits = jnp.asarray(np.atleast_2d(logits))
    rows, vocab = logits.shape
    ones = np.full((rows, mask_words(vocab)), 2**32 - 1, np.uint32)
    return sample(
        logits,
        Controls.of(settings, **flags),
        Tables.empty(rows, vocab) if tables is None else tables,
        jnp.asarray(ones if allowed is None else allowed),
        jnp.zeros(rows, jnp.int32) if positions is None else positions,
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.5, 0.25, 0.15]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 1 / 3, 0]),
        ({"top_k": 9}, [0.1, 0.5, 0.25, 0.15]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 2 / 3, 1 / 3, 0]),
        ({"top_p": 0.8}, [0, 5 / 9, 2.5 / 9, 1.5 / 9]),
        ({"top_p": 1e-6}, [0, 1, 0, 0]),
        # squared and renormalised: 0.01, 0.25, 0.0625, 0.0225 of 0.345
        ({"temperature": 0.5}, np.array([0.01, 0.25, 0.0625, 0.0225]) / 0.345),
        # top-k first: of the two left the first holds 2/3, which is enough for 0.6
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),
        # temperature first: 0.25 / 0.345 = 0.72 reaches 0.6 alone
        ({"temperature": 0.5, "top_p": 0.6}, [0, 1, 0, 0]),
        ({"min_p": 0.4}, [0, 2 / 3, 1 / 3, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        # temperature first: 0.0625 is a quarter of 0.25
        ({"temperature": 0.5, "min_p": 0.3}, [0, 1, 0, 0]),
    ],
)
def test_distribution(settings, expected):
    np.testing.assert_allclose(distribution(**settings), expected, atol=1e-6)


def test_ties_with_the_kth_stay():
    kept = np.isfinite(adjusted_logits(jnp.array([1.0, 2.0, 1.0, 0.0]), 1.0, 2, 1.0, 0.0))
    assert kept.tolist() == [True, True, True, False]


def test_draws_follow_the_distribution():
    rows = 4000
    settings = Sampling(temperature=1.0, top_k=3, seed=list(range(rows))).rows(rows)
    tokens = np.asarray(choose(np.tile(LOGITS, (rows, 1)), settings).tokens)
    counts = np.bincount(tokens, minlength=4) / rows
    np.testing.assert_allclose(counts, [0, 0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9], atol=0.03)


def test_greedy_takes_the_likeliest():
    assert choose([LOGITS, -LOGITS], [Sampling()] * 2).tokens.tolist() == [1, 0]


def test_a_draw_depends_on_seed_and_position_only():
    logits = np.tile(LOGITS, (3, 1))
    settings = Sampling(1.0, seed=[5, 6, 5]).rows(3)
    together = choose(logits, settings, positions=jnp.array([7, 7, 7])).tokens
    for row, setting in enumerate(settings):
        alone = choose(logits[:1], [setting], positions=jnp.array([7])).tokens
        assert int(alone[0]) == int(together[row])


def test_penalties_and_bias_change_only_their_own_row():
    """The numbers written out: token 1 was said twice, token 2 stands in the prompt."""
    logits = np.tile(np.array([0.5, 2.0, 1.9, -1.0], np.float32), (5, 1))
    tables = Tables(
        jnp.tile(jnp.array([0, 2, 0, 0]), (5, 1)),
        jnp.tile(jnp.array([False, False, True, False]), (5, 1)),
        jnp.tile(jnp.array([0.0, 0.0, 0.0, 5.0]), (5, 1)),
    )
    settings = [
        Sampling(),
        Sampling(repetition_penalty=8.0),  # 0.5 | 0.25 | 0.24
        Sampling(presence_penalty=0.2),  # 1.8 < 1.9
        Sampling(frequency_penalty=0.06),  # 2 - 0.12 < 1.9; with presence alone it would stay
        Sampling(logit_bias={3: 5.0}),
    ]
    assert choose(logits, settings, tables=tables).tokens.tolist() == [1, 0, 2, 2, 3]


def test_only_allowed_tokens_are_chosen():
    logits = np.zeros((2, 40), np.float32)
    logits[:, 33], logits[:, 7], logits[:, 39] = 3, 2, 1
    allowed = np.zeros((2, 2), np.uint32)
    allowed[:, 0], allowed[:, 1] = 1 << 7, 1 << (39 - 32)
    found = choose(logits, [Sampling()] * 2, allowed=allowed, masked=[True, False])
    assert found.tokens.tolist() == [7, 33]


def test_logprobs_are_the_models_own():
    """Of the distribution before temperature, penalties and bias."""
    found = choose(
        LOGITS,
        [Sampling(2.0, logit_bias={0: 50.0})],
        alternatives=[True],
        tables=Tables(jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), bool), jnp.array([[50.0, 0, 0, 0]])),
    )
    assert found.tokens.tolist() == [0]
    np.testing.assert_allclose(found.logprobs, np.log([0.1]), atol=1e-6)
    assert found.top_tokens.tolist() == [[1, 2, 3, 0]]
    np.testing.assert_allclose(np.exp(found.top_logprobs[0]), [0.5, 0.25, 0.15, 0.1], atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"presence_penalty": 3},
        {"frequency_penalty": -3},
        {"logit_bias": {1: float("inf")}},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampling(**settings)


def test_wrong_number_of_seeds():
    with pytest.raises(UserError, match="2 seeds for 3 rows"):
        Sampling(seed=[1, 2]).rows(3)
