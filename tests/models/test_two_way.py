"""Blocks of tokens that see each other: literal masks, windows, packing and the KV cache."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import reference

from mm_jax.data.example import Example
from mm_jax.data.packing import BatchConfig, Layout, blocks_of, collate
from mm_jax.models import (
    DecoderConfig,
    MultimodalConfig,
    MultimodalLM,
    ProjectorConfig,
    ViTConfig,
    init_cache,
)
from mm_jax.models.attention import block_mask

CONFIG = MultimodalConfig(
    ViTConfig(8, 8, 4, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8),
    None,
    ProjectorConfig("linear"),
    decoder=DecoderConfig(
        11, embed_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8, windows=(3, 0)
    ),
    two_way="media",
)


def batch(rows: int = 1, length: int = 9) -> dict[str, np.ndarray]:
    """Two text tokens, a picture of four, and text."""
    random = np.random.default_rng(0)
    index = np.array([-1, -1, 0, 1, 2, 3, -1, -1, -1], np.int32)
    arrays = {
        "tokens": random.integers(0, 11, (rows, length)).astype(np.int32),
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "media_index": np.tile(index, (rows, 1)),
        "loss_weights": np.tile(np.array([0] * 7 + [1, 1], np.float32), (rows, 1)),
        "pixel_values": random.normal(size=(rows, 1, 8, 8, 3)).astype(np.float32),
    }
    return arrays


def with_blocks(arrays: dict, kind: str) -> dict:
    blocks = {"blocks": blocks_of(kind, arrays)}
    return {key: value for key, value in (arrays | blocks).items() if key != "loss_weights"}


def test_block_mask_by_literal_example():
    segments, blocks = np.array([[1, 1, 1, 2, 2]]), np.array([[0, 1, 1, 1, 2]])
    seen = np.asarray(block_mask(segments, segments, blocks, blocks))[0, 0].astype(int).tolist()
    assert seen == [[0] * 5, [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("kind", ["media", "prefix"])
def test_who_moves_whom(kind):
    """The last token of a block moves its first one, never a token before the block; behind it nothing does."""
    model = MultimodalLM(replace(CONFIG, two_way=kind))
    arrays = with_blocks(batch(), kind)
    params = reference.draw(model, arrays)
    logits = jax.jit(lambda arrays: model.apply({"params": params}, arrays))
    before = np.asarray(logits(arrays))
    picture = arrays | {"pixel_values": arrays["pixel_values"].copy()}
    picture["pixel_values"][0, 0, 4:, 4:] += 1  # the last patch alone, but for attention within the tower
    moved = np.abs(np.asarray(logits(picture)) - before)[0].max(axis=-1) > 1e-6
    assert moved[2:].all() and moved[:2].all() == (kind == "prefix")
    answer = arrays | {"tokens": arrays["tokens"].copy()}
    answer["tokens"][0, 7] = (answer["tokens"][0, 7] + 1) % 11
    moved = np.abs(np.asarray(logits(answer)) - before)[0].max(axis=-1) > 1e-6
    assert not moved[:7].any() and moved[7:].all()


@pytest.mark.parametrize("kind", ["media", "prefix"])
def test_cache_equals_the_whole(kind):
    """The prompt in one call and the answer token by token, from a slot that is not the first."""
    model = MultimodalLM(replace(CONFIG, two_way=kind))
    arrays = with_blocks(batch(), kind)
    params = reference.draw(model, arrays)
    whole = np.asarray(model.apply({"params": params}, arrays))
    cache, start = init_cache(CONFIG.decoder, 1, 16), np.array([3], np.int32)
    tokens = ("tokens", "segment_ids", "positions", "media_index", "blocks")
    prompt = {key: value[:, :7] if key in tokens else value for key, value in arrays.items()}
    extend = jax.jit(lambda b, c, s: model.apply({"params": params}, b, c, s, method="extend"))
    found, cache = extend(prompt, cache, start)
    np.testing.assert_allclose(found, whole[:, :7], atol=1e-5)
    for at in (7, 8):
        step = {key: arrays[key][:, at : at + 1] for key in ("tokens", "segment_ids", "positions")}
        found, cache = extend(step, cache, start + at)
        np.testing.assert_allclose(found[:, 0], whole[:, at], atol=1e-5)


def conversation(length: int, trained: int) -> Example:
    """Text alone, the last tokens of which are trained."""
    none, count = np.full(length, -1, np.int32), np.arange(length, dtype=np.int32)
    weights = (count >= length - trained).astype(np.float32)
    empty = np.zeros((0, 0, 0), np.float32)
    return Example(
        count, weights, np.ones_like(count), count, none, none, empty[..., None], empty, np.zeros(0, np.int32)
    )


def test_collate_makes_blocks():
    """In a row of three conversations; nothing is trained in the second, which is all prefix."""
    rows = [[conversation(5, 2), conversation(3, 0), conversation(2, 1)]]
    size = BatchConfig(rows=1, length=11)
    arrays = collate(rows, size, Layout(two_way="prefix"), {"": 0})
    assert arrays["blocks"].tolist() == [[1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]]
    assert "blocks" not in collate(rows, size, Layout(), {"": 0})
