"""Layers of a decoder that read features beside the text: packing, the KV cache, patterns of layers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.models import (
    Context,
    Decoder,
    DecoderConfig,
    MultimodalConfig,
    MultimodalLM,
    ProjectorConfig,
    TiledViTConfig,
    init_cache,
    row_mask,
)

TOWER = TiledViTConfig(4, 4, 2, tiles=2, shapes=3, embed_dim=8, num_layers=2, num_global_layers=1, num_heads=2,
                       mlp_dim=8, taps=(0,))  # fmt: skip
DECODER = DecoderConfig(11, embed_dim=8, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8,
                        tie_embeddings=False, cross_layers=(1, 3), extra_tokens=2)  # fmt: skip
CONFIG = MultimodalConfig(TOWER, None, ProjectorConfig("linear"), decoder=DECODER)
# each of two texts in a row: tokens before its picture attend to it, but see nothing
SEEN = [[2, 2, 0, 0]] * 2 + [[1, 1, 0, 0]] * 3 + [[0, 0, 2, 2]] + [[0, 0, 1, 0]] * 3 + [[0] * 4]
SEGMENTS = [1] * 5 + [2] * 4 + [0]


@pytest.fixture(scope="module")
def model():
    """With gates that are open."""
    lm = MultimodalLM(CONFIG)
    params = jax.jit(lm.init)(jax.random.key(0), batch())["params"]
    noise = iter(jax.random.split(jax.random.key(1), 500))

    def open_(path, x):
        named = any("gate" in str(key) for key in path) and x.ndim < 3
        return x + 0.8 if named else x + 0.3 * jax.random.normal(next(noise), x.shape)

    params = jax.tree_util.tree_map_with_path(open_, params)
    return lm, params, jax.jit(lambda arrays: lm.apply({"params": params}, arrays))


def batch() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    segments = np.array([SEGMENTS], np.int32)
    return {
        "tokens": random.integers(0, 13, (1, 10)).astype(np.int32),
        "segment_ids": segments,
        "positions": np.array([[*range(5), *range(4), 0]], np.int32),
        "media_index": np.full((1, 10), -1, np.int32),
        "seen": np.array([SEEN], np.int8),
        "pixel_values": random.normal(size=(1, 2, 2, 4, 4, 3)).astype(np.float32),
        "tile_shapes": np.array([[2, 1]], np.int32),
        "tile_counts": np.array([[2, 1]], np.int32),
    }


def part(span: slice, slot: int) -> dict[str, np.ndarray]:
    """One text of the row with its own picture alone."""
    found = {}
    for name, array in batch().items():
        found[name] = array[:, span] if array.shape[1] == 10 else array[:, slot : slot + 1]
    found["seen"] = found["seen"][..., 2 * slot : 2 * slot + 2]
    found["segment_ids"] = np.minimum(found["segment_ids"], 1)  # padding stays 0
    return found


def logits(model, arrays):
    return np.asarray(model[2](arrays))


def test_packed_texts_read_their_own_pictures(model):
    packed = logits(model, batch())[0]
    for span, slot in ((slice(0, 5), 0), (slice(5, 9), 1)):
        alone = logits(model, part(slice(span.start, span.start + 5), slot))[0]
        assert np.abs(packed[span] - alone[: span.stop - span.start]).max() <= 1e-5
        other = batch()
        other["pixel_values"][:, 1 - slot] += 1
        moved = np.abs(logits(model, other)[0] - packed).max(-1) > 1e-4
        assert not moved[span].any() and moved[slice(5, 9) if slot == 0 else slice(0, 5)].all()


def test_what_sees_nothing_and_what_attends(model):
    """Without a picture the layers do nothing; tokens that attend without seeing are spared the MLP."""
    text = {k: v for k, v in batch().items() if not k.startswith(("pixel", "tile", "seen"))}
    plain = logits(model, text)
    blind = batch() | {"seen": np.zeros((1, 10, 4), np.int8)}
    assert np.abs(logits(model, blind) - plain).max() <= 1e-6
    sees = logits(
        model, batch() | {"seen": np.where(batch()["seen"] == 2, 1, batch()["seen"]).astype(np.int8)}
    )
    changed = np.abs(sees - logits(model, batch()))[0].max(-1) > 1e-4
    assert changed[:2].all() and changed[5]
    context = Context.of(jnp.array([[[1, 0], [0, 2], [0, 0]]]), 4, None)
    assert np.asarray(context.attends)[0, 0].astype(int).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1], [0] * 4]
    assert np.asarray(context.changes)[0, :, 0].tolist() == [True, False, False]


@pytest.mark.parametrize("cuts", [(5,), (2, 4, 5), (1, 2, 3, 4, 5)])
def test_cached_equals_whole(model, cuts):
    """Prefill in one or several pieces, then tokens one by one, which see what the last token of the prompt saw."""
    lm, params, _ = model
    arrays = part(slice(0, 5), 0)
    expected = logits(model, arrays)
    cache = init_cache(CONFIG.decoder, 1, 8, features=CONFIG.image_tokens, shares=2)
    extend = jax.jit(lambda b, c, s: lm.apply({"params": params}, b, c, s, method="extend"))
    start, found = 0, []
    media = ("pixel_values", "tile_shapes", "tile_counts")
    for stop in cuts:
        # up to the first token that sees; what comes behind it sees the same, and needs no picture
        known = start >= 3
        piece = {k: v if k in media else v[:, start:stop] for k, v in arrays.items()}
        if known:
            piece = {k: v for k, v in piece.items() if k not in (*media, "seen")}
        out, cache = extend(piece, cache, np.array([start], np.int32))
        found.append(np.asarray(out))
        start = stop
    assert np.abs(np.concatenate(found, axis=1) - expected).max() <= 1e-5


@pytest.mark.parametrize(
    "layers, cross, pattern",
    [
        (4, (1, 3), ("attention", "cross")),
        (4, (0, 3), ("cross", "attention", "attention", "cross")),
        (40, tuple(range(3, 40, 5)), (*["attention"] * 3, "cross", "attention")),
        (3, (), ("attention",)),
        (2, (0, 1), ("cross",)),
    ],
)
def test_periods(layers, cross, pattern):
    assert DecoderConfig(num_layers=layers, cross_layers=cross).pattern == pattern


@pytest.mark.parametrize("cross", [(0,), (0, 1, 2, 3)])
def test_patterns_without_a_period_or_of_one_kind(cross):
    """The gates are closed at first: the layers do nothing yet, but can learn to."""
    decoder = Decoder(replace(DECODER, cross_layers=cross))
    x, features = jax.random.normal(jax.random.key(0), (2, 1, 5, 8))
    mask = row_mask(jnp.ones((1, 5), jnp.int32))
    context = Context.of(jnp.ones((1, 5, 1), jnp.int32), 5, features)

    @jax.jit
    def run(params, context):
        return decoder.apply(params, x, mask, jnp.arange(5)[None], context=context, method="hidden")[0]

    @jax.jit
    def learn(params):
        return jax.grad(lambda params: jnp.sum(run(params, context) ** 3))(params)

    def everything(module, tokens):
        return module.logits(module.hidden(module.embed(tokens), mask, jnp.arange(5)[None])[0])

    params = jax.jit(lambda key: decoder.init(key, jnp.ones((1, 5), jnp.int32), method=everything))(
        jax.random.key(0)
    )
    assert np.allclose(run(params, context), run(params, None), rtol=0, atol=1e-6)
    layers, gradients = params["params"]["layers"], learn(params)["params"]["layers"]
    for k in cross[: len(decoder.config.pattern)]:
        for gate in ("attention_gate", "mlp_gate"):
            assert np.abs(gradients[f"block{k}"][gate]).min() > 1e-4
            layers[f"block{k}"][gate] += 1
    assert np.abs(np.asarray(run(params, context) - run(params, None))).max() > 0.01
