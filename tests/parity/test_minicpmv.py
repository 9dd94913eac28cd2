"""MiniCPM-V 2.6 against arrays of the authors' code."""

import json
import re

import jax
import numpy as np
import pytest

from mm_jax.data.media_rule import MEDIA
from mm_jax.data.pieces import slices
from mm_jax.families.minicpmv import buckets, slot
from tests.parity.released import FIXTURES, Case

ROOT = FIXTURES / "minicpmv_2_6"


@pytest.fixture(scope="module")
def case():
    return Case("minicpmv_2_6/a")


@pytest.fixture(scope="module")
def batch(case):
    return case.batch()


def test_matches_the_authors_code(case, batch, tmp_path):
    """The tower, the resampler, logits of left-padded rows, greedy answers, and the way back."""
    lm, tolerance = case.lm, case.meta["tolerance_atol"]
    assert lm.family == "minicpmv"
    features = np.asarray(
        jax.jit(lambda p, b: lm.model.apply({"params": p}, b, method="encode"))(lm.params, batch)
    )
    for number, (row, (start, stop)) in enumerate(
        zip(case["in/slice_row"], case["in/image_bound"], strict=True)
    ):
        found = features[row, batch["media_index"][row, start:stop]]
        assert np.abs(found - case["out/image_features"][number]).max() <= tolerance["image_features"]
    case.check(batch)
    case.check_greedy(batch)
    case.check_saving(tmp_path)


def test_gradients(case, batch):
    case.check_gradients(batch)


def test_which_positions_patches_take(case):
    table = case["out/bucket_table_70"]
    for count in range(1, 71):
        assert np.array_equal(buckets(count, 70), table[count, :count])
    vision = case.lm.config.vision
    for pixels, grid, expected in zip(
        case["in/pixel_values"], case["in/tgt_sizes"], case["out/vision_position_ids"], strict=True
    ):
        found = slot(pixels, grid, vision)["patch_table_index"][: len(expected), 0]
        assert np.array_equal(found, expected)


def test_pictures_and_their_text(case):
    """Pixel values and sizes of the raw pictures, and the ids of the prompts with the case's toy tokenizer."""
    rule, images, rows = case.lm.checkpoint.rule, case.images(), case["in/image_row"]
    made = rule.images(images)
    assert np.array_equal(made["tgt_sizes"], case["in/tgt_sizes"])
    case.same_pixels(made["pixel_values"], "in/pixel_values")
    for row, prompt in enumerate(case.meta["prompt_texts"]):
        mine = rule.images([image for image, place in zip(images, rows, strict=True) if place == row])
        for item in rule.items("image", mine, ()):
            prompt = prompt.replace("(<image>./</image>)", item.text.replace(MEDIA, "<unk>"), 1)
        ids = case["in/input_ids"][row][case["in/attention_mask"][row]]
        assert toy_ids(prompt, case.meta["toy_token_ids"]) == ids.tolist()


def toy_ids(text: str, specials: dict[str, int], vocab: int = 220) -> list[int]:
    """The case's tokenizer: special strings, digits, and other characters by their number."""
    pieces = re.split("(" + "|".join(map(re.escape, specials)) + ")", text)
    ids = []
    for piece in pieces:
        if piece in specials:
            ids.append(specials[piece])
        else:
            ids += [11 + int(c) if c.isdigit() else 21 + ord(c) % (vocab - 21) for c in piece]
    return ids


def test_the_table_of_slices():
    for row in json.loads((ROOT / "slicing_table.json").read_text()):
        found = slices((row["width"], row["height"]), 448, 14, row["max_slice_nums"])
        assert list(found.overview) == row["overview_width_height"]
        assert (found.grid and list(found.grid)) == row["grid_columns_rows"]
        assert (found.refined and list(found.refined)) == row["refined_width_height"]
        count = 1 + (0 if found.grid is None else found.grid[0] * found.grid[1])
        assert count * 64 == row["placeholder_count"]
