"""InternLM-XComposer2, plain and 4KHD, against arrays of the authors' code."""

import json

import jax
import numpy as np
import pytest

from mm_jax.data.bicubic import bicubic
from mm_jax.data.pieces import canvas
from mm_jax.families.xcomposer2 import layout
from tests.parity.released import FIXTURES, Case

ROOT = FIXTURES / "internlm_xcomposer2"


@pytest.fixture(scope="module", params=["a", "hd"])
def case(request):
    return Case(f"internlm_xcomposer2/{request.param}")


def test_matches_the_authors_code(case, tmp_path):
    """Features of the projector, logits of left-padded rows, greedy answers, and the way back."""
    arrays = case.batch()
    assert case.lm.family == "internlmxcomposer2"
    case.check_features(arrays)
    case.check(arrays)
    case.check_greedy(arrays)
    case.check_saving(tmp_path)


def test_adapters_are_for_image_tokens(case):
    """Text before the first picture does not notice them, everything behind does."""
    arrays = case.batch()
    params = jax.tree.map(lambda x: x, case.lm.params)
    layers = params["decoder"]["layers"]
    for part in ("attention", "mlp"):
        for name in [n for n in layers[part] if n.endswith("_adapter")]:
            layers[part][name] = jax.tree.map(lambda x: 0 * x, layers[part][name])
    apply = jax.jit(case.lm.apply)
    with_them, without = (np.asarray(apply(p, arrays)) for p in (case.lm.params, params))
    differ = np.abs(with_them - without).max(axis=-1) > 1e-3
    seen = np.cumsum(arrays["media_index"] != -1, axis=1) > 0
    real = arrays["segment_ids"] > 0
    assert not differ[real & ~seen].any() and differ[real & seen].mean() > 0.9


def test_pictures(case):
    """Pixel values of the raw pictures."""
    rule = case.lm.checkpoint.rule
    most = case.arrays.get("in/hd_num", [None] * 3)
    for k, image in enumerate(case.images()):
        case.same_pixels(rule.images([image], most[k])["pixel_values_0"], f"in/pixel_values_{k}")


def test_the_table_of_canvases():
    """Sizes, place of the picture and number of tokens at the released tile sizes."""
    table = json.loads((ROOT / "tiling_table.json").read_text())
    for row in table:
        old = row["rule"] == "4khd"
        tile = 336 if old else 560
        found = canvas((row["width"], row["height"]), tile, row["hd_num"], centred=old, enlarge=old)
        assert list(found.size) == row["output_width_height"]
        assert list(found.box) == row["content_box_left_top_right_bottom"]
        assert list(found.grid[::-1]) == row["tiles_rows_columns"]
        assert len(layout(*found.grid, tile // 28)) == row["token_count"]


@pytest.mark.parametrize("old, new", [((84, 168), (84, 84)), ((10, 7), (5, 20)), ((6, 6), (6, 6))])
def test_bicubic(old, new):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).normal(size=(*old, 3)).astype(np.float32)
    tensor = torch.from_numpy(np.moveaxis(image, -1, 0).copy())[None]
    expected = torch.nn.functional.interpolate(tensor, new, mode="bicubic")[0].numpy()
    assert np.abs(bicubic(image, new) - np.moveaxis(expected, 0, -1)).max() <= 1e-5
