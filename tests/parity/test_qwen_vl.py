"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL, dense and with experts, against transformers."""

import inspect
import json
import re

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file  # noqa: E402

import mm_jax  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import same_after_saving, same_gradients, same_greedy, same_logits  # noqa: E402

IMAGE, VIDEO, START, END = 93, 94, 95, 96
TOKENS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
)
ROPE = dict(rope_theta=10_000.0, rope_type="default")
TEXT = theirs.TEXT | dict(max_position_embeddings=256)
NEW = dict(depth=3, hidden_size=24, intermediate_size=36, num_heads=3, patch_size=4, out_hidden_size=32)
THREE = NEW | dict(num_position_embeddings=25, deepstack_visual_indexes=[0, 2])
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=12)
CASES = {
    "qwen2_vl": (
        "Qwen2VL",
        dict(TEXT, rope_parameters=ROPE | dict(mrope_section=[1, 2, 1])),
        dict(depth=3, embed_dim=24, hidden_size=32, num_heads=3, patch_size=4, mlp_ratio=2),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        dict(TEXT, rope_parameters=ROPE | dict(mrope_section=[1, 1, 2])),
        NEW | dict(window_size=16, fullatt_block_indexes=[1], tokens_per_second=1),
    ),
    "qwen3_vl": (
        "Qwen3VL",
        dict(TEXT, head_dim=16, rope_parameters=ROPE | dict(mrope_section=[4, 2, 2])),
        THREE,
    ),
    "qwen3_5": (
        "Qwen3_5",
        dict(TEXT, num_hidden_layers=4, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4,
             linear_key_head_dim=8, linear_value_head_dim=12, rms_norm_eps=1e-3,
             rope_parameters=ROPE | dict(mrope_section=[2, 1, 1], partial_rotary_factor=0.25)),
        NEW | dict(num_position_embeddings=25),
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        dict(TEXT, rope_parameters=ROPE | dict(mrope_section=[2, 2, 2]), **EXPERTS),
        THREE,
    ),
}  # fmt: skip
MEDIA = {
    "text": ((), ()),
    "images": (((1, 4, 6), (1, 2, 4)), ((1, 10, 8),)),
    "videos": (((3, 6, 6),), ((1, 2, 4), (2, 4, 6), (1, 4, 4))),
}


def build(case: str, directory, **save):
    name, text, vision = CASES[case]
    config = getattr(transformers, f"{name}Config")(
        text_config=dict(text), vision_config=dict(vision), **TOKENS
    )
    # what a short convolution gives is normalised, and should be no noise
    return theirs.build(config, directory, kind(case), scales={"conv1d": 4.0}, **save)


def kind(case: str) -> str:
    return f"{CASES[case][0]}ForConditionalGeneration"


def prompts(case: str, media, pad_left: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of text and media; each medium of a row is a grid, that of a video has more than one frame."""
    random = np.random.default_rng(seed)
    apart = case.startswith("qwen3")  # every frame of a video behind its time
    rows, grids = [], {IMAGE: [], VIDEO: []}
    for row, of_row in enumerate(media):
        ids = random.integers(3, IMAGE, 2 + row).tolist()
        for t, h, w in of_row:
            token = IMAGE if t == 1 else VIDEO
            grids[token].append((t, h, w))
            for _ in range(t if apart else 1):
                run = [token] * (h * w // 4 * (1 if apart else t))
                ids += [START, *run, END] + random.integers(3, IMAGE, 3).tolist()
        rows.append(ids)
    size = max(map(len, rows))
    pad = [[0] * (size - len(ids)) for ids in rows]
    join = (lambda one, two: two + one) if pad_left else (lambda one, two: one + two)
    arrays = {
        "input_ids": np.array([join(ids, p) for ids, p in zip(rows, pad, strict=True)]),
        "attention_mask": np.array([join([1] * len(ids), p) for ids, p in zip(rows, pad, strict=True)]),
    }
    if any(media):
        kinds = np.where(arrays["input_ids"] == IMAGE, 1, np.where(arrays["input_ids"] == VIDEO, 2, 0))
        arrays["mm_token_type_ids"] = kinds
    named = {IMAGE: ("pixel_values", "image_grid_thw"), VIDEO: ("pixel_values_videos", "video_grid_thw")}
    for token, (values, thw) in named.items():
        if grids[token]:
            arrays[thw] = np.array(grids[token])
            shape = (int(arrays[thw].prod(1).sum()), 3 * 2 * 4 * 4)
            arrays[values] = random.normal(size=shape).astype(np.float32)
    return arrays


def their_positions(model, arrays) -> np.ndarray:
    """[3, B, S]"""
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    takes = inspect.signature(model.model.get_rope_index).parameters.keys() | {
        "input_ids",
        "mm_token_type_ids",
    }
    takes |= {"image_grid_thw", "attention_mask"}
    return model.model.get_rope_index(**{k: v for k, v in tensors.items() if k in takes})[0].numpy()


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, build(request.param, directory), mm_jax.load(directory)


def test_matches_transformers(pair, tmp_path):
    """No medium, several pictures, videos; padding on either side; features, positions, gradients; the way back."""
    case, model, lm = pair
    assert lm.family == case
    same_logits(model, lm, prompts(case, MEDIA["text"]))
    pictures, videos = prompts(case, MEDIA["images"], True), prompts(case, MEDIA["videos"], seed=1)
    for arrays in (pictures, videos):
        same_logits(model, lm, arrays)
        batch, real = lm.batch(**arrays), arrays["attention_mask"].astype(bool)
        assert np.array_equal(
            batch["positions"][real], their_positions(model, arrays).transpose(1, 2, 0)[real]
        )
    same_features(model, lm, pictures)
    same_greedy(model, lm, pictures)
    same_gradients(model, lm, videos, tmp_path / "gradients")
    same_after_saving(model, lm, pictures, tmp_path / "out", kind(case))


def same_features(model, lm, arrays):
    """The features that the tokens of pictures take, against the reference's own."""
    batch = lm.batch(**arrays)
    ours = np.asarray(lm.model.apply({"params": lm.params}, batch, method="encode"))
    rows, places = np.nonzero(batch["media_index"] >= 0)
    # behind them stand the features for the decoder's first layers
    ours = ours[rows, batch["media_index"][rows, places], : lm.config.decoder.embed_dim]
    with torch.no_grad():
        inputs = (torch.from_numpy(arrays[k]) for k in ("pixel_values", "image_grid_thw"))
        expected = torch.cat(model.model.get_image_features(*inputs).pooler_output).numpy()
    assert expected.std() > 0.1 and np.abs(ours - expected).max() < 1e-4


def test_time(pair):
    """A video longer than its frames are wide: our text goes on behind its last frame, and explicit positions count."""
    case, model, lm = pair
    arrays = prompts(case, (((5, 2, 4),), ()))
    if case == "qwen2_5_vl":
        arrays["second_per_grid_ts"] = np.array([1.6], np.float32)  # 1.6 positions, rounded down
    position_ids = their_positions(model, arrays)
    ours = lm.batch(**arrays)["positions"]
    start = int(np.argmax(arrays["input_ids"][0] == VIDEO))
    span = slice(start, start + 10)
    if case == "qwen3_vl":
        assert np.array_equal(ours[0], position_ids[:, 0].T)
    elif not case.startswith("qwen3"):
        assert np.array_equal(ours[0, span], position_ids[:, 0, span].T)
        reached = start + (6 if case == "qwen2_5_vl" else 4)
        assert ours[0, span].max() == reached and (ours[0, start + 10] == reached + 1).all()
    same_logits(model, lm, arrays | {"position_ids": position_ids})


def module(name: str) -> str:
    """The spelling of the model's own state_dict in version 5."""
    return re.sub("^visual", "model.visual", re.sub("^model", "model.language_model", name))


def test_spellings(tmp_path):
    build("qwen2_vl", tmp_path)
    before = mm_jax.load(tmp_path)
    seen = []
    theirs.rename(tmp_path, lambda name: seen.append(name) or module(name))
    assert {name.split(".")[0] for name in seen} == {"model", "visual", "lm_head"}  # that of hub files
    after = mm_jax.load(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before.params, after.params))


def test_released_experts(tmp_path):
    """Released files have the experts' matrices the other way round than those of version 5."""
    build("qwen3_vl_moe", tmp_path)
    before = mm_jax.load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    turned = {k: np.ascontiguousarray(v.swapaxes(1, 2)) for k, v in tensors.items() if ".experts." in k}
    assert len(turned) == 4
    save_file(tensors | turned, tmp_path / "model.safetensors")
    after = mm_jax.load(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before.params, after.params))
    mm_jax.save(after, tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(again[name], array) for name, array in (tensors | turned).items())


def test_flat_config(tmp_path):
    """Released files hold the text config's fields beside the others, and the old names of some."""
    build("qwen2_vl", tmp_path)
    before = mm_jax.load(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 1]}}
    values["vision_config"] |= {"in_chans": 3, "spatial_patch_size": 4}
    path.write_text(json.dumps(text | values | {"model_type": "qwen2_vl", "vision_token_id": 92}))
    assert mm_jax.load(tmp_path).config == before.config


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda a: a | {"image_grid_thw": a["image_grid_thw"][:1]},
            r"pixel_values has shape \[.*is needed after",
        ),
        (lambda a: {k: v for k, v in a.items() if k != "image_grid_thw"}, "belong together"),
        (
            lambda a: a | {"input_ids": np.where(a["input_ids"] == IMAGE, 5, a["input_ids"])},
            r"3 images take 6, 2, 20 tokens.*\[0, 0\]",
        ),
        (
            lambda a: a | {"input_ids": np.where(a["input_ids"] == 5, IMAGE, a["input_ids"])},
            "3 images take 6, 2, 20 tokens",
        ),
        (
            lambda a: a | {"image_grid_thw": np.array([[1, 3, 8], [1, 2, 4], [1, 10, 8]])},
            "merged 2 x 2",
        ),
        (lambda a: a | {"position_ids": a["input_ids"]}, r"position_ids has shape .* \[3, 2, "),
    ],
)
def test_wrong_batches(change, message, pair):
    case, _, lm = pair
    if case == "qwen2_vl":
        arrays = prompts(case, MEDIA["images"])
        arrays["input_ids"][0, 0] = 5
        with pytest.raises(mm_jax.UserError, match=message):
            lm.batch(**change(arrays))
