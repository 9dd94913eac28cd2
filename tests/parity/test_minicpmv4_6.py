"""MiniCPM-V 4.6 against transformers."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import PIL.Image  # noqa: E402

import mm_jax  # noqa: E402
from mm_jax.data.media_rule import MEDIA  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import same_after_saving, same_gradients, same_greedy, same_logits  # noqa: E402
from tests.parity.record import note  # noqa: E402

IMAGE, PATCH = 93, 4
KIND = "MiniCPMV4_6ForConditionalGeneration"
TEXT = theirs.TEXT | dict(
    model_type="qwen3_5_text", num_hidden_layers=4, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=12, max_position_embeddings=256, rms_norm_eps=1e-3,
)  # fmt: skip
VISION = theirs.VISION | dict(patch_size=PATCH, image_size=28)
# slices of a row, each rows and columns of patches
PICTURES = (((4, 8), (8, 4), (8, 8)), (), ((12, 4),))
OVERHEAD = dict(max_slice_nums=4, scale_resolution=64, patch_size=PATCH)


def build(directory, **options):
    config = transformers.MiniCPMV4_6Config(
        text_config=dict(TEXT), vision_config=dict(VISION), **dict(image_token_id=IMAGE, insert_layer_id=1) | options
    )  # fmt: skip
    # what a short convolution gives is normalised, and should be no noise; so is what linear attention gives, where
    # the larger eps keeps next to nothing from becoming as large as all else; logits of about unit scale
    model = theirs.build(config, directory, KIND, scales={"conv1d": 4.0, "lm_head": 0.5})
    transformers.models.minicpmv4_6.MiniCPMV4_6ImageProcessorPil(
        **OVERHEAD, downsample_mode=config.downsample_mode
    ).save_pretrained(directory)
    return model


def prompts(
    pictures=PICTURES, each: int = 16, pad_left: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows of text with pictures; `each` patches are a token."""
    random = np.random.default_rng(seed)
    sizes = [size for row in pictures for size in row]
    arrays = theirs.pictured(
        [[(2 * k, rows * columns // each) for k, (rows, columns) in enumerate(row)] for row in pictures],
        IMAGE, 1, (1, 1), pad_left=pad_left, seed=seed,
    )  # fmt: skip
    arrays.pop("pixel_values", None)
    if sizes:
        arrays["target_sizes"] = np.array(sizes, np.int32)
        width = PATCH * int(arrays["target_sizes"].prod(1).sum())
        arrays["pixel_values"] = random.normal(size=(1, 3, PATCH, width)).astype(np.float32)
    return arrays


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("minicpmv4_6")
    return build(directory), mm_jax.load(directory)


def test_matches_transformers(pair, tmp_path):
    """Features, logits of rows with several pictures, one and none, padding on either side, gradients, answers."""
    model, lm = pair
    assert lm.family == "minicpmv4_6"
    left, right = prompts(pad_left=True), prompts(seed=1)
    same_features(model, lm, left)
    same_logits(model, lm, left)
    same_logits(model, lm, right)
    same_logits(model, lm, prompts(((), ())))
    same_greedy(model, lm, left)
    same_gradients(model, lm, left, tmp_path / "gradients")
    same_after_saving(model, lm, right, tmp_path / "out", KIND)


def same_features(model, lm, arrays):
    batch = lm.batch(**arrays)
    found = np.asarray(
        jax.jit(lambda p, b: lm.model.apply({"params": p}, b, method="encode"))(lm.params, batch)
    )
    rows, places = np.nonzero(batch["media_index"] >= 0)
    with torch.no_grad():
        inputs = (torch.from_numpy(arrays[k]) for k in ("pixel_values", "target_sizes"))
        expected = torch.cat(model.model.get_image_features(*inputs).pooler_output).numpy()
    error = np.abs(found[rows, batch["media_index"][rows, places]] - expected).max()
    assert 0.1 < expected.std() < 10 and error <= 1e-4, error


@pytest.mark.parametrize(
    "options, each",
    [(dict(downsample_mode="4x"), 4), (dict(insert_layer_id=2), 16), (dict(insert_layer_id=0), 16)],
)
def test_where_patches_join(options, each, tmp_path):
    model = build(tmp_path / "in", **options)
    lm = mm_jax.load(tmp_path / "in")
    arrays = prompts(each=each)
    same_logits(model, lm, arrays)
    same_after_saving(model, lm, arrays, tmp_path / "out", KIND)


@pytest.mark.parametrize(
    "size", [(20, 33), (64, 64), (65, 64), (90, 150), (300, 40), (41, 823), (200, 200), (97, 131), (130, 130)]
)
def test_pictures_and_their_text(size, pair):
    _, lm = pair
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    theirs_ = transformers.models.minicpmv4_6.MiniCPMV4_6ImageProcessorPil(**OVERHEAD)
    expected = theirs_([PIL.Image.fromarray(picture)], return_tensors="np")
    rule = lm.checkpoint.rule
    found = rule.images([picture])
    assert np.array_equal(found["target_sizes"], expected["target_sizes"])
    assert found["slice_grids"].tolist() == expected["grids"]
    error = float(np.abs(found["pixel_values"] - expected["pixel_values"]).max())
    assert error <= 1e-6
    note(lm.family, "preprocessing", error)
    [item] = rule.items("image", found, ())
    text = Writer().replace_image_token(expected, 0, image_token_divisor=16).replace("#", MEDIA)
    assert item.text == f"<image_id>0</image_id>{text}" and item.features == text.count(MEDIA)


class Writer:
    """As much of the reference's processor as writes the text of a picture."""

    image_start_token, image_end_token = "<image>", "</image>"
    slice_start_token, slice_end_token = "<slice>", "</slice>"
    image_token, slice_mode = "#", True
    replace_image_token = transformers.models.minicpmv4_6.MiniCPMV4_6Processor.replace_image_token


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a | {"target_sizes": a["target_sizes"] + 1}, "that 4 divides"),
        (lambda a: a | {"target_sizes": a["target_sizes"][:2]}, "is needed after target_sizes"),
        (lambda a: {k: v for k, v in a.items() if k != "target_sizes"}, "belong together"),
    ],
)
def test_wrong_batches(change, message, pair):
    with pytest.raises(mm_jax.UserError, match=message):
        pair[1].batch(**change(prompts()))
