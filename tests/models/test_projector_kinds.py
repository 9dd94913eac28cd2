"""Projectors: how many tokens, in which order, from which features."""

import jax
import numpy as np
import pytest
import reference

from mm_jax.models import MLPProjector, ProjectorConfig, Resampler
from mm_jax.models.projectors import PROJECTORS, sincos_2d


def run(module, params, *inputs):
    """`grid` is static: it is a shape, not data."""
    x, grid, *mask = inputs
    return np.asarray(jax.jit(lambda p, x, *m: module.apply({"params": p}, x, grid, *m))(params, x, *mask))


@pytest.mark.parametrize(
    "config, grid, tokens",
    [
        (ProjectorConfig("linear"), (8, 8), 64),
        (ProjectorConfig("linear", (2, 2)), (8, 6), 12),
        (ProjectorConfig("mlp", (2, 2), hidden_dim=8), (8, 8), 16),
        (ProjectorConfig("mlp", (8, 1), hidden_dim=8), (80, 1), 10),
        (ProjectorConfig("resampler", hidden_dim=8, num_queries=5, num_heads=2), (8, 6), 5),
        (ProjectorConfig("resampler", (2, 2), hidden_dim=8, num_queries=7, num_heads=2), (80, 1), 7),
        (ProjectorConfig("qformer", hidden_dim=8, num_queries=3, num_heads=2, mlp_dim=8), (8, 6), 3),
        (ProjectorConfig("latent", num_queries=4, num_heads=2), (80, 1), 4),
    ],
)
def test_num_tokens_is_what_comes_out(config, grid, tokens):
    assert config.num_tokens(grid) == tokens
    module = PROJECTORS[config.kind](config, 6)
    x = np.zeros((3, grid[0] * grid[1], 4), np.float32)
    shape = jax.eval_shape(lambda key: module.init_with_output(key, x, grid)[0], jax.random.key(0)).shape
    assert shape == (3, tokens, 6)


def identity(size: int) -> dict:
    """Norm and dense layer that hand on the merged features, normalised."""
    zeros, ones = np.zeros(size, np.float32), np.ones(size, np.float32)
    return {"norm": {"scale": ones, "bias": zeros}, "out": {"kernel": np.diag(ones), "bias": zeros}}


@pytest.mark.parametrize(
    "grid, merge, blocks",
    [
        ((4, 4), (2, 2), [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
        ((2, 6), (2, 3), [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]),
        ((6, 1), (3, 1), [[0, 1, 2], [3, 4, 5]]),
        ((2, 4), (1, 2), [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
)
def test_merged_blocks_by_literal_example(grid, merge, blocks):
    """Features numbered row by row: tokens are the blocks row by row, and within a block it is the same."""
    # squares: after the normalisation of a token two blocks could look alike otherwise
    x = np.arange(grid[0] * grid[1], dtype=np.float32)[None, :, None] ** 2
    size = merge[0] * merge[1]
    found = run(MLPProjector(ProjectorConfig("linear", merge), size), identity(size), x, grid)[0]
    np.testing.assert_allclose(found, reference.layer_norm(np.array(blocks) ** 2.0), atol=1e-4)


def test_channels_stay_together_when_features_merge():
    x = np.array([[[1, 2], [3, 5], [7, 11], [13, 17]]], np.float32)  # four features of two channels
    found = run(MLPProjector(ProjectorConfig("linear", (2, 1)), 4), identity(4), x, (4, 1))[0]
    np.testing.assert_allclose(found, reference.layer_norm([[1, 2, 3, 5], [7, 11, 13, 17]]), atol=1e-5)


def features(count: int = 6, channels: int = 10) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, count, channels)).astype(np.float32)


def test_mlp_equals_the_formula():
    x = features()
    module = MLPProjector(ProjectorConfig("mlp", (2, 1), hidden_dim=12), 8)
    params = reference.draw(module, x, (2, 3))
    merged = np.concatenate([x[:, :3], x[:, 3:]], axis=-1)
    hidden = reference.gelu_tanh(
        reference.dense(params["hidden"], reference.layer_norm(merged, **params["norm"]))
    )
    expected = reference.dense(params["out"], hidden)
    np.testing.assert_allclose(run(module, params, x, (2, 3)), expected, atol=2e-5)


CONFIG = ProjectorConfig("resampler", hidden_dim=16, num_queries=3, num_heads=2)


def resampled(params, x, grid, mask=None) -> np.ndarray:
    """Learned queries attend to features; keys know their place, values do not; then an MLP."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = reference.layer_norm(reference.dense(p["input"], x), **p["input_norm"])
    query = np.broadcast_to(p["query"], (len(x), *p["query"].shape))
    a = p["attention"]
    heads = (
        reference.heads(reference.dense(a["query"], reference.layer_norm(query, **p["query_norm"])), 2),
        reference.heads(reference.dense(a["key"], x + sincos_2d(grid, 16)), 2),
        reference.heads(reference.dense(a["value"], x), 2),
    )
    mask = None if mask is None else mask[:, None, None, :]
    out = reference.attention(*heads, mask)[0].reshape(len(x), -1, 16)
    y = query + reference.dense(a["out"], out)
    hidden = reference.dense(p["mlp"]["up"], reference.layer_norm(y, **p["mlp_norm"]))
    y = y + reference.dense(p["mlp"]["down"], reference.gelu_tanh(hidden))
    return reference.dense(p["out"], reference.layer_norm(y, **p["out_norm"]))


def test_resampler_equals_the_formula():
    x, module = features(), Resampler(CONFIG, 8)
    params = reference.draw(module, x, (2, 3))
    np.testing.assert_allclose(run(module, params, x, (2, 3)), resampled(params, x, (2, 3)), atol=2e-5)
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 0, 1, 0, 1, 1]], bool)
    expected = resampled(params, x, (6, 1), mask)
    np.testing.assert_allclose(run(module, params, x, (6, 1), mask), expected, atol=2e-5)


def test_resampler_ignores_masked_features():
    x, module = features(), Resampler(CONFIG, 8)
    params = reference.draw(module, x, (6, 1))
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], bool)
    expected = run(module, params, x, (6, 1), mask)
    garbage = np.where(mask[..., None], x, 100 * x[:, ::-1])
    np.testing.assert_array_equal(run(module, params, garbage, (6, 1), mask), expected)
    seen = x.copy()
    seen[:, 2] *= -1
    assert np.abs(run(module, params, seen, (6, 1), mask) - expected).max((1, 2)).min() > 1e-3


def test_resampler_knows_where_a_feature_is():
    """The same features in another order are another picture, unless the keys are blind."""
    x, module = features(), Resampler(CONFIG, 8)
    params = reference.draw(module, x, (2, 3))
    turned = x[:, ::-1]
    assert np.abs(run(module, params, x, (2, 3)) - run(module, params, turned, (2, 3))).max() > 1e-2
    key = params["attention"]["key"]
    blind = {"kernel": np.zeros_like(key["kernel"]), "bias": key["bias"]}
    params = {**params, "attention": {**params["attention"], "key": blind}}
    np.testing.assert_allclose(run(module, params, x, (2, 3)), run(module, params, turned, (2, 3)), atol=1e-5)


READERS = {
    "qformer": ProjectorConfig("qformer", hidden_dim=16, num_queries=3, num_heads=2, mlp_dim=24, text_vocab=9,
                               text_length=5),
    "latent": ProjectorConfig("latent", num_queries=3, num_heads=2),
}  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
def test_readers_ignore_masked_features(kind):
    """Real features move the tokens, those under the mask do not; an order of them there is not."""
    x, module = features(), PROJECTORS[kind](READERS[kind], 8)
    params = reference.draw(module, x, (6, 1))
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], bool)
    expected = run(module, params, x, (6, 1), mask)
    garbage = np.where(mask[..., None], x, 100 * x[:, ::-1])
    np.testing.assert_array_equal(run(module, params, garbage, (6, 1), mask), expected)
    seen = x.copy()
    seen[:, 2] *= -1
    assert np.abs(run(module, params, seen, (6, 1), mask) - expected).max((1, 2)).min() > 1e-3


def test_instructions_end_where_their_padding_begins():
    x, module = features(), PROJECTORS["qformer"](READERS["qformer"], 8)
    params = reference.draw(module, x, (6, 1))
    mask = np.ones((2, 6), bool)
    short = run(module, params, x, (6, 1), mask, np.array([[4, 7], [4, 7]]))
    long = run(module, params, x, (6, 1), mask, np.array([[4, 7, -1, -1], [4, 7, 2, -1]]))
    np.testing.assert_allclose(long[0], short[0], atol=5e-5)
    assert np.abs(long[1] - short[1]).max() > 1e-3
    assert np.abs(run(module, params, x, (6, 1), mask) - short).max() > 1e-3


def test_sincos_2d_by_literal_example():
    """Width 4 has the frequency 1 alone: sin and cos of the column, then of the row."""
    s, c = np.sin, np.cos
    expected = [
        [0, 1, 0, 1],
        [s(1), c(1), 0, 1],
        [s(2), c(2), 0, 1],
        [0, 1, s(1), c(1)],
        [s(1), c(1), s(1), c(1)],
        [s(2), c(2), s(1), c(1)],
    ]
    np.testing.assert_allclose(sincos_2d((2, 3), 4), expected, atol=1e-6)
    # width 8: frequencies 1 and 1/100
    column = [s(2), s(0.02), c(2), c(0.02)]
    row = [s(1), s(0.01), c(1), c(0.01)]
    np.testing.assert_allclose(sincos_2d((2, 3), 8)[5], column + row, atol=1e-6)
