"""The attention entry against a softmax written out in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mm_jax import models
from mm_jax.models import attention_mask

attention, attention_weights = jax.jit(models.attention), jax.jit(models.attention_weights)

SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3]], np.int32)


def inputs(heads: int, kv_heads: int, queries: int = 6, keys: int = 6) -> tuple[jax.Array, ...]:
    random = np.random.default_rng(0)
    shapes = (2, queries, heads, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8)
    return tuple(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)


def slots(rows: int = 2, queries: int = 6, start: int = 0) -> np.ndarray:
    return np.broadcast_to(start + np.arange(queries, dtype=np.int32), (rows, queries))


MASKS = {
    "all": None,
    "segments": attention_mask(SEGMENTS, SEGMENTS, None, 6),
    "causal": attention_mask(None, None, slots(), 6),
    "packed": attention_mask(SEGMENTS, SEGMENTS, slots(), 6),
}


def test_masks_by_literal_example():
    ids = np.array([[1, 1, 2, 0]], np.int32)
    assert attention_mask(ids, ids, None, 4)[0, 0].astype(int).tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    assert attention_mask(ids, ids, slots(1, 4), 4)[0, 0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    assert attention_mask(None, None, None, 4) is None


def test_queries_at_slots_of_a_cache():
    """Two new tokens at the slots 1, 2 of the first row and 3, 4 of the second; slot 5 was never written."""
    queries = np.ones((2, 2), np.int32)
    cache = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], np.int32)
    mask = attention_mask(queries, cache, np.array([[1, 2], [3, 4]], np.int32), 6)
    assert mask.shape == (2, 1, 2, 6)
    assert mask[0, 0].astype(int).tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert mask[1, 0].astype(int).tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("mask", MASKS)
def test_equals_the_formula(heads, kv_heads, mask):
    query, key, value = inputs(heads, kv_heads)
    expected, weights = reference.attention(query, key, value, MASKS[mask])
    np.testing.assert_allclose(attention(query, key, value, MASKS[mask]), expected, atol=2e-6)
    np.testing.assert_allclose(attention_weights(query, key, MASKS[mask]), weights, atol=1e-6)


def test_more_keys_than_queries():
    query, key, value = inputs(4, 2, queries=2, keys=7)
    mask = attention_mask(None, None, np.array([[0, 1], [4, 5]], np.int32), 7)
    expected, weights = reference.attention(query, key, value, mask)
    np.testing.assert_allclose(attention(query, key, value, mask), expected, atol=2e-6)
    np.testing.assert_allclose(attention_weights(query, key, mask), weights, atol=1e-6)
    assert weights[0, :, 0, 1:].max() == 0


@pytest.mark.parametrize("mask", MASKS)
def test_the_weights_are_those_that_attention_uses(mask):
    query, key, value = inputs(4, 2)
    weights = attention_weights(query, key, MASKS[mask])
    out = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(value, 2, axis=2))
    np.testing.assert_allclose(out, attention(query, key, value, MASKS[mask]), atol=2e-6)


@pytest.mark.parametrize("length", [150, 300])
@pytest.mark.parametrize("window", [0, 70])
def test_long_causal_rows_meet_only_the_keys_they_may_see(length, window):
    """Rows long enough to be taken in blocks, with segments that begin within a block and a last block cut short."""
    query, key, value = inputs(4, 2, length, length)
    segments = np.stack([1 + np.arange(length) // 90, 1 + np.arange(length) // 200]).astype(np.int32)
    mask = dataclasses.replace(models.row_mask(segments), window=jnp.int32(window))
    expected, _ = reference.attention(query, key, value, mask.array(length))
    np.testing.assert_allclose(attention(query, key, value, mask), expected, atol=2e-6)

    def total(mask, *arrays):
        return jnp.sin(attention(*arrays, mask)).sum()

    # a table says nothing of its order, so all queries meet all keys at once
    found, plain = (jax.grad(total, (1, 2, 3))(m, query, key, value) for m in (mask, mask.array(length)))
    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_bias_is_added_behind_the_cap():
    query, key, value = inputs(4, 2)
    bias = np.random.default_rng(1).normal(size=(1, 4, 6, 6)).astype(np.float32)
    logits = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, 2, axis=2)) * 8**-0.5
    for cap in (0.0, 2.0):
        weights = jax.nn.softmax((cap * jnp.tanh(logits / cap) if cap else logits) + bias, axis=-1)
        expected = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(value, 2, axis=2))
        found = jax.jit(models.attention, static_argnames="cap")(query, key, value, bias=bias, cap=cap)
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_row_that_sees_nothing_is_finite_and_so_are_its_gradients():
    query, key, value = inputs(2, 1)
    mask = np.ones((2, 1, 6, 6), bool)
    mask[0, 0, 3] = False

    def total(*arrays):
        return attention(*arrays, jnp.asarray(mask)).sum()

    assert np.isfinite(attention(query, key, value, mask)).all()
    assert np.isfinite(attention_weights(query, key, mask)).all()
    for gradient in jax.jit(jax.grad(total, (0, 1, 2)))(query, key, value):
        assert np.isfinite(gradient).all()
    # and it does not disturb the rows beside it
    expected, _ = reference.attention(query[1:], key[1:], value[1:])
    np.testing.assert_allclose(attention(query, key, value, mask)[1:], expected, atol=2e-6)


def test_low_precision_inputs_have_a_float32_softmax():
    """64 keys of nearly equal logits: a bfloat16 softmax could not tell the weights apart."""
    query = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    key = jnp.linspace(1, 1.05, 64)[None, :, None, None] * jnp.ones(8)
    key = key.astype(jnp.bfloat16)
    value = jnp.ones((1, 64, 1, 8), jnp.bfloat16)
    weights = attention_weights(query, key)
    assert weights.dtype == jnp.float32
    _, expected = reference.attention(query, key, value)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    out = attention(query, key, value)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, value[:, :1])
