"""Sampling against distributions written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.errors import UserError
from mm_jax.inference.sampling import Sampling, adjusted_logits, sample

PROBABILITIES = np.array([0.1, 0.5, 0.25, 0.15], np.float32)
LOGITS = np.log(PROBABILITIES)


def distribution(temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    return np.asarray(jax.nn.softmax(adjusted_logits(jnp.asarray(LOGITS), temperature, top_k, top_p)))


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
    ],
)
def test_distribution(settings, expected):
    np.testing.assert_allclose(distribution(**settings), expected, atol=1e-6)


def test_ties_with_the_kth_stay():
    kept = np.isfinite(adjusted_logits(jnp.array([1.0, 2.0, 1.0, 0.0]), 1.0, 2, 1.0))
    assert kept.tolist() == [True, True, True, False]


def test_draws_follow_the_distribution():
    rows = 4000
    controls = Sampling(temperature=1.0, top_k=3, seed=list(range(rows))).controls(rows)
    tokens = np.asarray(sample(jnp.tile(LOGITS, (rows, 1)), controls, jnp.zeros(rows, jnp.int32)))
    counts = np.bincount(tokens, minlength=4) / rows
    np.testing.assert_allclose(counts, [0, 0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9], atol=0.03)


def test_greedy_takes_the_likeliest():
    controls = Sampling().controls(2)
    assert sample(jnp.stack([LOGITS, -LOGITS]), controls, jnp.zeros(2, jnp.int32)).tolist() == [1, 0]


def test_a_draw_depends_on_seed_and_position_only():
    logits = jnp.tile(LOGITS, (3, 1))
    together = sample(logits, Sampling(1.0, seed=[5, 6, 5]).controls(3), jnp.array([7, 7, 7]))
    for row, seed in enumerate([5, 6, 5]):
        alone = sample(logits[:1], Sampling(1.0, seed=seed).controls(1), jnp.array([7]))
        assert int(alone[0]) == int(together[row])


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}],
)
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampling(**settings)


def test_wrong_number_of_seeds():
    with pytest.raises(UserError, match="2 seeds for 3 rows"):
        Sampling(seed=[1, 2]).controls(4, given=3)
