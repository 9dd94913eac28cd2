"""InternLM-XComposer2, plain and 4KHD, against arrays of the authors' code; and 2.5, of which there are none, against
the same rules put together from torch's own parts."""

import json
import math

import jax
import numpy as np
import PIL.Image
import pytest

import mm_jax
from mm_jax.data.bicubic import bicubic
from mm_jax.data.pieces import canvas
from mm_jax.families.xcomposer2 import layout
from tests.parity import hosts
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


def test_gradients(case):
    case.check_gradients(case.batch())


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


TILE = 560


@pytest.fixture(scope="module")
def newest(tmp_path_factory):
    """The high-resolution case with 2.5's tiles, under whose 40 x 40 patches no other table fits, and a tokenizer."""
    from safetensors.flax import load_file, save_file

    directory = tmp_path_factory.mktemp("newest")
    tensors = load_file(ROOT / "hd" / "model.safetensors")
    name = "vit.vision_tower.vision_model.embeddings.position_embedding.weight"
    random = np.random.default_rng(0)
    table = random.normal(size=(1 + (TILE // 14) ** 2, tensors[name].shape[1]))
    tensors[name] = jax.numpy.asarray(0.5 * table, tensors[name].dtype)
    tokenizer = hosts.sentence_pieces("[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]", add_bos_token=True)
    for name in ("model.tok_embeddings.weight", "output.weight"):
        drawn = random.normal(size=(len(tokenizer), tensors[name].shape[1]))
        tensors[name] = jax.numpy.asarray(0.2 * drawn, tensors[name].dtype)
    save_file(tensors, directory / "model.safetensors")
    values = json.loads((ROOT / "hd" / "config.json").read_text()) | {
        "vocab_size": len(tokenizer), "max_length": 16384, "max_position_embeddings": 24576,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(values))
    tokenizer.save_pretrained(directory)
    return mm_jax.load(directory, dtype="float32"), tokenizer


def drawn(picture: np.ndarray, most: int) -> np.ndarray:
    """float32 [1, 3, H, W]: as many tiles as the picture fills, white behind it."""
    image, turned = PIL.Image.fromarray(picture), picture.shape[1] < picture.shape[0]
    image = image.transpose(PIL.Image.Transpose.TRANSPOSE) if turned else image
    ratio, count = image.width / image.height, 1
    while count * math.ceil(count / ratio) <= most:
        count += 1
    count = min(count - 1, math.ceil(image.width / TILE))
    size = count * TILE, int(count * TILE / ratio)
    canvas_ = PIL.Image.new("RGB", (size[0], math.ceil(size[1] / TILE) * TILE), (255, 255, 255))
    canvas_.paste(image.resize(size, PIL.Image.Resampling.BILINEAR), (0, 0))
    canvas_ = canvas_.transpose(PIL.Image.Transpose.TRANSPOSE) if turned else canvas_
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    values = (np.asarray(canvas_, np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return values.transpose(2, 0, 1)[None]


def test_pictures_of_2_5(newest):
    """24 tiles for one picture, 6 each for several; small ones are not made larger than they must."""
    rule = newest[0].checkpoint.rule
    images = [np.asarray(hosts.picture(*size)) for size in ((700, 300), (90, 1200), (30, 20), (1200, 1130))]
    for some, most in (*(([image], 24) for image in images), (images, 6)):
        made = rule.images(some)
        assert len(made) == len(some)
        for k, image in enumerate(some):
            expected = drawn(image, most)
            assert made[f"pixel_values_{k}"].shape == expected.shape
            assert np.abs(made[f"pixel_values_{k}"] - expected).max() <= 1e-6


def test_features_and_answers_of_2_5(newest):
    """Of a wide and a high picture; answers with a cache are those of the full forward; text in front has one start."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safetensors.torch import load_file

    lm, tokenizer = newest
    assert lm.checkpoint.rule.tile == TILE and lm.config.image_tokens == 400 and lm.max_length == 24576
    tensors = {k: v.float() for k, v in load_file(lm.checkpoint.directory / "model.safetensors").items()}
    config = transformers.CLIPVisionConfig(**lm.checkpoint.values["vision_config"] | {"image_size": TILE})
    tower = transformers.CLIPVisionModel(config).eval()
    prefix = "vit.vision_tower.vision_model."
    own = {k.removeprefix("vision_model."): k for k in tower.state_dict()}
    found = {own[k.removeprefix(prefix)]: v for k, v in tensors.items() if k.startswith(prefix)}
    assert not any(
        k for k in tower.load_state_dict(found, strict=False).missing_keys if "position_ids" not in k
    )

    def merged(pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, T, T] -> [n, 20, 20, 4C]"""
        x = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:].unflatten(1, (20, 2, 20, 2))
        return x.permute(0, 1, 3, 2, 4, 5).flatten(3)

    def lines(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, tensors["plora_sub_GN"][0].expand(len(x), 1, -1)], 1).flatten(0, 1)

    images = [hosts.picture(700, 300), hosts.picture(60, 130)]
    features = []
    with torch.no_grad():
        for image in images:
            whole = torch.from_numpy(drawn(np.asarray(image), 6))
            rows, columns = (n // TILE for n in whole.shape[2:])
            tiles = whole.unflatten(3, (columns, TILE)).unflatten(2, (rows, TILE)).permute(0, 2, 4, 1, 3, 5)
            parts = merged(tiles.flatten(0, 2)).unflatten(0, (rows, columns)).permute(0, 2, 1, 3, 4)
            view = merged(torch.nn.functional.interpolate(whole, (TILE, TILE), mode="bicubic"))[0]
            x = torch.cat([lines(view), tensors["plora_glb_GN"][0], lines(parts.flatten(2, 3).flatten(0, 1))])
            for k in (0, 2):
                x = torch.nn.functional.linear(
                    x, tensors[f"vision_proj.{k}.weight"], tensors[f"vision_proj.{k}.bias"]
                )
                x = torch.nn.functional.gelu(x) if k == 0 else x
            features.append(x.numpy())
            assert len(x) == (rows * columns + 1) * 400 + 1 + (rows + 1) * 20
    talk = hosts.messages([images[0], "and", images[1], "what is in the picture?"])
    batch = lm.batch(messages=talk)
    embedded = jax.jit(lambda p, b: lm.model.apply({"params": p}, b, method="_embed")[0])(lm.params, batch)
    taken = batch["media_index"][0] != -1
    expected = np.concatenate(features)
    assert 0.1 < expected.std() < 10 and np.abs(np.asarray(embedded)[0][taken] - expected).max() <= 1e-4
    start, end = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
    texts = ("", f"{start}user\n", "and", f"what is in the picture?{end}\n{start}assistant\n")
    ids = [
        tokenizer(texts[1])["input_ids"],
        *(tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts[2:]),
    ]
    real = batch["segment_ids"][0] > 0
    assert batch["tokens"][0][real & ~taken].tolist() == sum(ids, [])
    said = lm.generate(batch, 3, ignore_eos=True)[0]
    logits = jax.jit(lm.apply)
    for k in range(3):
        at = int(real.sum()) - 1
        assert np.asarray(logits(lm.params, batch))[0, at].argmax() == said[k]
        for name, value in (
            ("tokens", said[k]),
            ("segment_ids", 1),
            ("positions", at + 1),
            ("media_index", -1),
        ):
            batch[name][0, at + 1] = value
        real = batch["segment_ids"][0] > 0
