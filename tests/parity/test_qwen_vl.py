"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import same_after_saving, same_greedy, same_logits  # noqa: E402

IMAGE, VIDEO, START, END = 93, 94, 95, 96
TOKENS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
)
SECTIONS = dict(rope_theta=10_000.0, rope_type="default", mrope_section=[1, 2, 1])
TEXT = theirs.TEXT | dict(max_position_embeddings=256)
CASES = {
    "qwen2_vl": (
        "Qwen2VL",
        dict(TEXT, rope_parameters=SECTIONS),
        dict(depth=3, embed_dim=24, hidden_size=32, num_heads=3, patch_size=4, mlp_ratio=2),
    ),
}


def build(case: str, directory, **save):
    name, text, vision = CASES[case]
    config = getattr(transformers, f"{name}Config")(
        text_config=dict(text), vision_config=dict(vision), **TOKENS
    )
    return theirs.build(config, directory, f"{name}ForConditionalGeneration", **save)


def prompts(case: str, media, pad_left: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of text and media; each medium of a row is a grid, a video's with more than one frame."""
    random = np.random.default_rng(seed)
    rows, grids = [], {IMAGE: [], VIDEO: []}
    for row, of_row in enumerate(media):
        ids = random.integers(3, IMAGE, 2 + row).tolist()
        for t, h, w in of_row:
            token = IMAGE if t == 1 else VIDEO
            grids[token].append((t, h, w))
            ids += [START] + [token] * (t * h * w // 4) + [END] + random.integers(3, IMAGE, 3).tolist()
        rows.append(ids)
    size = max(map(len, rows))
    pad = [[0] * (size - len(ids)) for ids in rows]
    join = (lambda one, two: two + one) if pad_left else (lambda one, two: one + two)
    arrays = {
        "input_ids": np.array([join(ids, p) for ids, p in zip(rows, pad, strict=True)]),
        "attention_mask": np.array([join([1] * len(ids), p) for ids, p in zip(rows, pad, strict=True)]),
    }
    kinds = np.where(arrays["input_ids"] == IMAGE, 1, np.where(arrays["input_ids"] == VIDEO, 2, 0))
    if any(media):
        arrays["mm_token_type_ids"] = kinds
    for token, values, thw in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        if grids[token]:
            arrays[thw] = np.array(grids[token])
            size = (int(arrays[thw].prod(1).sum()), 3 * 2 * 4 * 4)
            arrays[values] = random.normal(size=size).astype(np.float32)
    return arrays


MEDIA = {
    "text": ((), ()),
    "image": (((1, 4, 6),), ()),
    "images": (((1, 4, 6), (1, 2, 4)), ((1, 10, 8),)),
    "video": (((3, 6, 6),), ((1, 2, 4), (2, 4, 6), (1, 4, 4))),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    model = build(case, tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    assert lm.family == case
    for name, media in MEDIA.items():
        for pad_left in (False, True):
            arrays = prompts(case, media, pad_left)
            print(name, pad_left, same_logits(model, lm, arrays))
    same_greedy(model, lm, prompts(case, MEDIA["images"], True))
    kind = f"{CASES[case][0]}ForConditionalGeneration"
    same_after_saving(model, lm, prompts(case, MEDIA["images"]), tmp_path / "out", kind)
