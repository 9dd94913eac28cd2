"""The decoder against its formulas in numpy, and its cached form against the full forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mm_jax.models import Decoder, DecoderConfig, attention_mask, init_cache
from mm_jax.models import layers as layers_module

LENGTH = 9
SIZES = {"vocab_size": 23, "embed_dim": 16, "num_layers": 2, "head_dim": 6, "mlp_dim": 20}
CONFIGS = {
    "grouped": DecoderConfig(num_heads=4, num_kv_heads=2, **SIZES),
    "untied": DecoderConfig(num_heads=3, num_kv_heads=3, tie_embeddings=False, **SIZES),
    "qk_norm": DecoderConfig(num_heads=4, num_kv_heads=1, qk_norm=True, rope_theta=500.0, **SIZES),
}


def call(decoder, tokens, segments, positions, cache=None, starts=None):
    """What MultimodalLM does around a decoder, without media."""
    rows, length = tokens.shape
    if cache is None:
        slots, keys = jnp.broadcast_to(jnp.arange(length), (rows, length)), segments
    else:
        write = jax.vmap(lambda old, new, start: jax.lax.dynamic_update_slice_in_dim(old, new, start, 0))
        keys = write(cache["segment_ids"], segments, starts)
        cache = cache | {"segment_ids": keys}
        slots = starts[:, None] + jnp.arange(length)
    mask = attention_mask(segments, keys, slots, keys.shape[1])
    x, cache = decoder.hidden(decoder.embed(tokens), mask, positions, cache, starts)
    return decoder.logits(x), cache


@functools.cache
def make(config: DecoderConfig):
    """(params, jitted forward pass). One program serves all tests of a config: rows of LENGTH tokens."""
    decoder = Decoder(config)
    ones = np.ones((1, 4), np.int32)
    params = reference.draw(decoder, ones, ones, ones, method=call)
    return params, jax.jit(lambda params, *arrays: decoder.apply({"params": params}, *arrays, method=call))


def rows() -> tuple[np.ndarray, np.ndarray]:
    """tokens [2, LENGTH]; positions of one conversation a row"""
    tokens = np.random.default_rng(1).integers(0, 23, (2, LENGTH)).astype(np.int32)
    return tokens, np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)


def formula(config: DecoderConfig, params: dict, tokens, positions, mask) -> np.ndarray:
    """Logits [B, T, vocab] in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = params["embedding"]["embedding"][tokens]
    for layer in range(config.num_layers):
        p = jax.tree.map(lambda x: x[layer], params["layers"])  # noqa: B023
        y = reference.rms_norm(x, p["attention_norm"]["scale"])
        a = p["attention"]
        query = reference.heads(reference.dense(a["query"], y), config.num_heads)
        key, value = (
            reference.heads(reference.dense(a[n], y), config.num_kv_heads) for n in ("key", "value")
        )
        if config.qk_norm:
            query = reference.rms_norm(query, a["query_norm"]["scale"])
            key = reference.rms_norm(key, a["key_norm"]["scale"])
        query, key = (reference.rotary(z, positions, config.rope_theta) for z in (query, key))
        out, _ = reference.attention(query, key, value, mask)
        x = x + reference.dense(a["out"], out.reshape(*out.shape[:2], -1))
        y = reference.rms_norm(x, p["mlp_norm"]["scale"])
        m = p["mlp"]
        x = x + reference.dense(
            m["down"], reference.silu(reference.dense(m["gate"], y)) * reference.dense(m["up"], y)
        )
    x = reference.rms_norm(x, params["norm"]["scale"])
    head = params["embedding"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
    return x @ head


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_formula(name):
    config = CONFIGS[name]
    params, apply = make(config)
    assert ("head" in params) == (not config.tie_embeddings)
    tokens, _ = rows()
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3], [1, 1, 2, 2, 2, 2, 2, 2, 2]], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6]], np.int32)
    logits, cache = apply(params, tokens, segments, positions)
    assert cache is None and logits.dtype == jnp.float32
    mask = (segments[:, :, None] == segments[:, None, :]) & np.tri(LENGTH, dtype=bool)
    expected = formula(config, params, tokens, positions, mask[:, None])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_pieces_equal_the_full_forward_pass(name):
    """Rows of 9 and 6 tokens, read in right-padded pieces that end at different places of each row."""
    config = CONFIGS[name]
    params, apply = make(config)
    tokens, positions = rows()
    lengths = np.array([9, 6])
    segments = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    full, _ = apply(params, tokens, segments, positions)
    cache = init_cache(config, 2, 16)
    found = np.full(full.shape, np.nan, np.float32)
    starts = np.zeros(2, np.int32)
    # (width of the piece, real tokens of each row): a prefill in two parts, then single tokens
    for width, counts in ((4, [4, 1]), (4, [2, 3]), (1, [1, 1]), (1, [1, 1]), (1, [1, 0])):
        chunk, chunk_positions = np.zeros((2, 2, width), np.int32)
        real = (np.arange(width) < np.array(counts)[:, None]).astype(np.int32)
        for b, count in enumerate(counts):
            chunk[b, :count] = tokens[b, starts[b] : starts[b] + count]
            chunk_positions[b, :count] = positions[b, starts[b] : starts[b] + count]
        logits, cache = apply(params, chunk, real, chunk_positions, cache, starts)
        for b, count in enumerate(counts):
            found[b, starts[b] : starts[b] + count] = logits[b, :count]
        starts = starts + np.array(counts, np.int32)
    assert starts.tolist() == lengths.tolist()
    for b, length in enumerate(lengths):
        np.testing.assert_allclose(found[b, :length], full[b, :length], atol=1e-5)
    assert np.asarray(cache["segment_ids"]).sum(1).tolist() == lengths.tolist()


def test_a_token_sees_nothing_behind_it_and_nothing_of_other_segments():
    params, apply = make(CONFIGS["grouped"])
    tokens, _ = rows()
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 0]] * 2, np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 0]] * 2, np.int32)
    before = np.asarray(apply(params, tokens, segments, positions)[0])
    for place, changed in ((0, [0, 1, 2, 3]), (2, [2, 3]), (5, [5, 6, 7]), (8, [8])):
        other = tokens.copy()
        other[0, place] = (other[0, place] + 1) % 23
        after = np.asarray(apply(params, other, segments, positions)[0])
        assert np.flatnonzero((after != before).any(-1)[0]).tolist() == changed
        np.testing.assert_array_equal(after[1], before[1])


def test_many_layers_are_a_loop_that_computes_the_same(monkeypatch):
    """Stacks longer than UNROLLED_ON_CPU are scanned: parameters and results are the same."""
    config = CONFIGS["qk_norm"]
    tokens, positions = rows()
    batch = tokens, np.ones_like(tokens), positions
    params, apply = make(config)
    unrolled, _ = apply(params, *batch)
    monkeypatch.setattr(layers_module, "UNROLLED_ON_CPU", 0)
    looped_params, looped_apply = make.__wrapped__(config)
    jax.tree.map(np.testing.assert_array_equal, looped_params, params)
    assert "stablehlo.while" in looped_apply.lower(params, *batch).as_text()
    np.testing.assert_allclose(looped_apply(params, *batch)[0], unrolled, atol=1e-5)
    assert {x.shape[0] for x in jax.tree.leaves(params["layers"])} == {config.num_layers}


def test_every_layer_draws_its_own_parameters():
    ones = jnp.ones((1, 4), jnp.int32)
    init = jax.jit(lambda key: Decoder(CONFIGS["grouped"]).init(key, ones, ones, ones, method=call))
    kernel = init(jax.random.key(0))["params"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (2, 16, 20) and not np.array_equal(kernel[0], kernel[1])
