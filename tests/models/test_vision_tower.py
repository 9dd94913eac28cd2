"""The ViT: patches in the order of its positions, and one block against its formula."""

import jax
import numpy as np
import pytest
import reference

from mm_jax.models import VisionTransformer, ViTConfig
from mm_jax.models.layers import sincos_2d

CONFIG = ViTConfig(height=8, width=12, patch_size=4, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24)


@pytest.fixture(scope="module")
def params() -> dict:
    return reference.draw(VisionTransformer(CONFIG), np.zeros((1, 8, 12, 3), np.float32))


apply = jax.jit(lambda params, pixels: VisionTransformer(CONFIG).apply({"params": params}, pixels))


def without_blocks(params: dict) -> dict:
    """What is added to the residual stream by attention and MLP becomes zero."""
    flat = jax.tree_util.tree_map_with_path(
        lambda path, x: np.zeros_like(x) if path[-2].key in ("out", "down") else x, params["layers"]
    )
    return {**params, "layers": flat}


def embedded(params: dict, pixels: np.ndarray) -> np.ndarray:
    """Patch (r, c) flattened row by row, pixel by pixel, colour last; token r * columns + c; its position."""
    tokens = []
    for r in range(2):
        for c in range(3):
            patch = pixels[:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].reshape(len(pixels), -1)
            position = np.asarray(params["positions"])[3 * r + c]
            tokens.append(reference.dense(params["patch_embed"], patch) + position)
    return np.stack(tokens, axis=1)


def test_grid():
    assert CONFIG.grid == (2, 3)


def test_patches_and_positions_row_by_row(params):
    pixels = np.random.default_rng(1).normal(size=(2, 8, 12, 3)).astype(np.float32)
    bare = without_blocks(params)
    expected = reference.layer_norm(embedded(params, pixels), params["norm"]["scale"], params["norm"]["bias"])
    np.testing.assert_allclose(apply(bare, pixels), expected, atol=1e-5)


@pytest.mark.parametrize("row, column", [(0, 0), (0, 2), (1, 0), (1, 1)])
def test_a_bright_patch_changes_its_own_token_before_attention(params, row, column):
    bare = without_blocks(params)
    dark = np.zeros((1, 8, 12, 3), np.float32)
    bright = dark.copy()
    bright[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    changed = np.abs(np.asarray(apply(bare, bright) - apply(bare, dark))[0]).max(-1)
    assert np.flatnonzero(changed).tolist() == [3 * row + column]
    # with attention it reaches every token
    assert np.abs(np.asarray(apply(params, bright) - apply(params, dark))[0]).max(-1).min() > 0


def test_equals_the_formula(params):
    """One pre-norm block: attention over all patches, an MLP, biases everywhere."""
    pixels = np.random.default_rng(2).normal(size=(2, 8, 12, 3)).astype(np.float32)
    x = embedded(params, pixels)
    p = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["layers"])
    y = reference.layer_norm(x, **p["attention_norm"])
    a = p["attention"]
    query, key, value = (reference.heads(reference.dense(a[n], y), 2) for n in ("query", "key", "value"))
    out, _ = reference.attention(query, key, value)
    x = x + reference.dense(a["out"], out.reshape(2, 6, 16))
    y = reference.layer_norm(x, **p["mlp_norm"])
    x = x + reference.dense(p["mlp"]["down"], reference.gelu_tanh(reference.dense(p["mlp"]["up"], y)))
    expected = reference.layer_norm(x, params["norm"]["scale"], params["norm"]["bias"])
    np.testing.assert_allclose(apply(params, pixels), expected, atol=2e-5)


def test_pictures_of_a_batch_do_not_see_each_other(params):
    pixels = np.random.default_rng(3).normal(size=(3, 8, 12, 3)).astype(np.float32)
    together = apply(params, pixels)
    for k in range(3):
        np.testing.assert_allclose(apply(params, pixels[k : k + 1])[0], together[k], atol=1e-5)


def test_stem_keeps_the_grid_and_its_order():
    """A bright block in one corner changes the token of that corner most, with and without convolutions in front."""
    config = ViTConfig(16, 24, patch_size=8, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, stem=(8, 8))
    model = VisionTransformer(config)
    dark = np.zeros((1, 16, 24, 3), np.float32)
    params = model.init(jax.random.key(0), dark)
    bright = dark.copy()
    bright[0, 10:14, 18:22] = 1.0  # inside the patch of row 1, column 2
    moved = np.abs(np.asarray(model.apply(params, bright) - model.apply(params, dark))).sum(-1)[0]
    assert moved.shape == (6,) and moved.argmax() == 5


def test_positions_start_as_sines_and_cosines_with_none_for_the_class_token():
    config = ViTConfig(16, 24, patch_size=8, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16,
                       position_init="sincos", class_token="drop")  # fmt: skip
    params = VisionTransformer(config).init(jax.random.key(0), np.zeros((1, 16, 24, 3), np.float32))["params"]
    np.testing.assert_array_equal(params["positions"][0], np.zeros(16))
    np.testing.assert_allclose(params["positions"][1:], sincos_2d((2, 3), 16), rtol=1e-6)
