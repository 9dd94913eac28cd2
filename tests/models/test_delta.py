"""Layers of the gated delta rule: the parallel form, packing, padding, and the memory that decoding goes on from."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.models import (
    Decoder,
    DecoderConfig,
    DeltaConfig,
    MultimodalConfig,
    MultimodalLM,
    Texts,
    attention_mask,
    gated_delta,
    init_cache,
)
from mm_jax.models.delta import short_convolution
from mm_jax.models.quantised import Quantised, quantised

DELTA = DeltaConfig(2, 4, key_dim=4, value_dim=6, kernel_size=3)
DECODER = DecoderConfig(
    11, embed_dim=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=8, delta=DELTA,
    delta_layers=(0, 2), rotary_dim=4, attention_gate=True, norm="rms_centred", qk_norm=True,
)  # fmt: skip
CONFIG = MultimodalConfig(None, None, decoder=DECODER)
LENGTHS = (70, 5, 1, 60)  # of the texts in a row, over one chunk and within one


@pytest.fixture(scope="module")
def model():
    lm = MultimodalLM(CONFIG)
    params = jax.jit(lm.init)(jax.random.key(0), batch([[4]]))["params"]
    noise = iter(jax.random.split(jax.random.key(1), 500))

    def visible(path, x):
        moved = x + 0.3 * jax.random.normal(next(noise), x.shape)
        return moved - 5 if "log_rate" in str(path[-1]) else moved  # memories that reach far

    params = jax.tree_util.tree_map_with_path(visible, params)
    return lm, params, jax.jit(lambda arrays: lm.apply({"params": params}, arrays))


def batch(rows, pad: int = 0, left: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    """Texts of these lengths packed in rows, padded to the longest and `pad` more; `left` padding in front."""
    size = left + max(map(sum, rows)) + pad
    found = {name: np.zeros((len(rows), size), np.int32) for name in ("tokens", "segment_ids", "positions")}
    for row, lengths in enumerate(rows):
        place = left
        for k, length in enumerate(lengths):
            span = slice(place, place + length)
            found["tokens"][row, span] = np.random.default_rng(seed + 100 * row + k).integers(0, 11, length)
            found["segment_ids"][row, span] = k + 1
            found["positions"][row, span] = np.arange(length)
            place += length
    return found | {"media_index": np.full((len(rows), size), -1, np.int32)}


def token_by_token(query, key, value, decay, rate, numbers, state):
    """The rule as it stands, in float64."""
    length, heads = value.shape[0], value.shape[1] // query.shape[1]
    out, number = np.zeros(value.shape), 0
    for t in range(length):
        if numbers[t] != number:
            state, number = np.zeros_like(state), numbers[t]
        for n in range(value.shape[1]):
            q, k = query[t, n // heads], key[t, n // heads]
            s = state[n] * np.exp(decay[t, n])
            state[n] = s + rate[t, n] * np.outer(k, value[t, n] - k @ s)
            out[t, n] = q @ state[n]
    return out, state


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("alike", [False, True])
def test_chunks_are_the_rule_token_by_token(chunk, alike):
    """Also where all keys are alike and nothing fades, where powers of the keys' products would lose all digits."""
    random, length = np.random.default_rng(0), sum(LENGTHS)
    query, key = random.normal(size=(2, 2, length, 2, 4))
    key = np.ones_like(key) + 1e-3 * key if alike else key
    key = key / np.linalg.norm(key, axis=-1, keepdims=True)
    value = random.normal(size=(2, length, 4, 6))
    decay = (0 if alike else -1) * random.exponential(size=(2, length, 4))
    rate = np.ones_like(decay) if alike else random.uniform(size=decay.shape)
    state = random.normal(size=(2, 4, 4, 6))
    numbers = np.stack([np.repeat(np.arange(4), LENGTHS), np.zeros(length)]).astype(np.int32)
    arrays = query, key, value, decay, rate, numbers, state
    narrow = (x if x is numbers else x.astype(np.float32) for x in arrays)
    out, last = jax.jit(gated_delta, static_argnames="chunk")(*narrow, chunk=chunk)
    for row in range(2):
        expected, end = token_by_token(*(x[row].copy() for x in arrays))
        assert np.abs(out[row] - expected).max() <= 2e-5 and np.abs(last[row] - end).max() <= 2e-5


def test_convolution_by_literal_example():
    texts = Texts.of(jnp.array([[0, 1, 1, 2, 2, 0]]))
    assert texts.numbers.tolist() == [[0, 0, 0, 1, 1, 1]] and texts.real.tolist()[0] == [
        False,
        *[True] * 4,
        False,
    ]
    x = jnp.array([0.0, 1, 2, 3, 4, 0])[None, :, None]
    out, _ = short_convolution(x, jnp.array([[100.0], [10], [1]]), texts, jnp.zeros((1, 2, 1)))
    assert out[0, :5, 0].tolist() == [0, 1, 12, 3, 34]
    # the tail is of the text that goes on, and ends where the padding begins
    texts = Texts.of(jnp.array([[1, 2, 0], [1, 1, 1]]), jnp.array([4, 4]))
    x = jnp.array([[3.0, 4, 0], [5, 6, 7]])[..., None]
    out, tail = short_convolution(x, jnp.array([[100.0], [10], [1]]), texts, jnp.array([[[1.0], [2]]] * 2))
    assert out[:, :2, 0].tolist() == [[123, 4], [125, 256]] and tail[..., 0].tolist() == [[0, 4], [6, 7]]


def test_packed_is_unpacked(model):
    packed = np.asarray(model[2](batch([LENGTHS], pad=3)))[0]
    start = 0
    for k, length in enumerate(LENGTHS):
        alone = batch([(length,)], pad=2, left=k, seed=k)
        found = np.asarray(model[2](alone))[0, k : k + length]
        assert np.abs(found - packed[start : start + length]).max() <= 5e-5
        start += length


def test_every_layer_reaches_far(model):
    """The last token of a long text depends on the first one, through the delta layers alone."""
    lm, params, _ = model
    lm = MultimodalLM(replace(CONFIG, decoder=replace(DECODER, windows=(2,) * 4)))
    arrays = batch([(66,)])
    run = jax.jit(lambda arrays: lm.apply({"params": params}, arrays)[0, -1])
    moved = arrays | {"tokens": arrays["tokens"].copy()}
    moved["tokens"][0, 0] += 1
    assert np.abs(np.asarray(run(arrays) - run(moved))).max() > 1e-4


@pytest.mark.parametrize("cuts", [(75,), (66, 75), (3, 4, 70, 71, 75)])
def test_cached_is_whole(model, cuts):
    """In pieces of any length with padding behind, from a row of the cache that holds another text."""
    lm, params, run = model
    arrays = batch([(75,), (70,)])
    expected = np.asarray(run(arrays))
    cache = init_cache(DECODER, 2, 96)
    cache = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, cache)  # of another text
    extend = jax.jit(lambda b, c, s: lm.apply({"params": params}, b, c, s, method="extend"))
    start = 0
    for stop in cuts:
        piece = {name: np.pad(x[:, start:stop], ((0, 0), (0, 3))) for name, x in arrays.items()}
        out, cache = extend(piece, cache, np.full(2, start, np.int32))
        real = arrays["segment_ids"][:, start:stop] > 0
        assert np.abs(np.asarray(out)[:, : stop - start] - expected[:, start:stop])[real].max() <= 5e-5
        start = stop


def test_gradients_are_of_packed_texts_too(model):
    """And stay finite where what is remembered fades within a token."""
    lm, params, _ = model
    fast = jax.tree_util.tree_map_with_path(lambda p, x: x + 10 if "log_rate" in str(p[-1]) else x, params)

    @jax.jit
    def gradient(params, arrays):
        def loss(params):
            logits = lm.apply({"params": params}, arrays)
            return jnp.sum(jnp.where((arrays["segment_ids"] > 0)[..., None], jnp.sin(logits), 0))

        return jax.grad(loss)(params)

    packed = gradient(params, batch([(70, 9)], pad=2))
    alone = [gradient(params, batch([(length,)], left=k, seed=k)) for k, length in enumerate((70, 9))]
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(packed))
    jax.tree.map(lambda p, a, b: np.testing.assert_allclose(p, a + b, atol=2e-5 * scale), packed, *alone)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(fast, batch([(70, 9)]))))


def test_integer_kernels(model):
    """Maps of these layers as integers, as of all others."""
    lm, params, run = model
    arrays = batch([(20,)])
    rounded = quantised(params, "int8")
    delta = rounded["decoder"]["layers"]["block0"]["delta"]
    assert all(
        isinstance(delta[name]["kernel"], Quantised) for name in ("query", "key", "value", "gate", "out")
    )

    def floats(x):
        return x.floats(jnp.float32) if isinstance(x, Quantised) else x

    plain = jax.tree.map(floats, rounded, is_leaf=lambda x: isinstance(x, Quantised))
    apply = jax.jit(lambda params: lm.apply({"params": params}, arrays))
    found, expected = np.asarray(apply(rounded)), np.asarray(apply(plain))
    assert np.abs(found - expected).max() <= 2e-4
    assert np.abs(found - np.asarray(run(arrays))).max() > 1e-2


def test_masks_without_segments_are_refused():
    x = jnp.ones((1, 4, 16))
    mask = attention_mask(None, None, jnp.arange(4)[None], 4)
    with pytest.raises(ValueError, match="segments"):
        Decoder(DECODER).init(jax.random.key(0), x, mask, jnp.arange(4)[None], method="hidden")
