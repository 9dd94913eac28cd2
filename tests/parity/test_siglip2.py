"""SigLIP2's tower for pictures in their own shape (NaFlex) against transformers: features, patches, sizes."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.siglip2 import image_processing_pil_siglip2 as reference  # noqa: E402

import mm_jax  # noqa: E402
from mm_jax.data.media_rule import Settings  # noqa: E402
from mm_jax.data.naflex_rule import NaflexRule, naflex_size  # noqa: E402
from mm_jax.data.patches import PatchLayout  # noqa: E402
from mm_jax.families.qwen2_vl import BOXES  # noqa: E402
from mm_jax.families.siglip2 import tower as tower_of  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity.checks import came_back, same_features  # noqa: E402
from tests.parity.record import note  # noqa: E402

VISION = theirs.VISION | dict(patch_size=4, num_patches=16)
CASES = {
    "plain": {},
    "no-head": dict(vision_use_head=False, num_patches=49, hidden_act="gelu", layer_norm_eps=1e-3),
}
SCALES = {"position_embedding": 8.0}  # of 0.15: it stands beside patches of many pixels


def build(directory, **options):
    config = transformers.Siglip2VisionConfig(**VISION | options)
    return theirs.build(config, directory, "Siglip2VisionModel", scales=SCALES)


def pictures(shapes, room: int, seed: int = 0) -> dict[str, np.ndarray]:
    """As the reference's processor has them; what is behind a picture's own patches is noise."""
    random = np.random.default_rng(seed)
    counts = np.prod(shapes, axis=1)
    return {
        "pixel_values": random.normal(size=(len(shapes), room, 48)).astype(np.float32),
        "pixel_attention_mask": (np.arange(room) < counts[:, None]).astype(np.int32),
        "spatial_shapes": np.array(shapes, np.int64),
    }


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    """Pictures of the table's own grid, of larger, smaller and much longer ones in a batch; both spellings of names."""
    model = build(tmp_path / "in", **CASES[case])
    shapes = [(4, 4), (7, 7), (2, 3), (1, 30), (30, 1), (5, 6), (1, 1), (3, 10)]
    arrays = pictures(shapes, 49)
    with torch.no_grad():
        expected = model(**{k: torch.from_numpy(v) for k, v in arrays.items()}).last_hidden_state.numpy()
    real = arrays["pixel_attention_mask"] > 0
    for spelling in ("as saved", "as on the hub"):
        if spelling == "as on the hub":
            theirs.rename(tmp_path / "in", lambda tensor: f"vision_model.{tensor}")
        tower = mm_jax.load(tmp_path / "in")
        assert tower.family == "siglip2_vision_model"
        ours = np.asarray(jax.jit(tower.apply)(tower.params, tower.batch(**arrays)))
        same_features(tower, ours[real], expected[real], 2e-5)
    came_back(tower, model, tmp_path / "out")


def test_the_tower_of_a_two_tower_checkpoint(tmp_path):
    text = dict(vocab_size=20, max_position_embeddings=8, hidden_size=24, intermediate_size=24, num_hidden_layers=1,
                num_attention_heads=2)  # fmt: skip
    config = transformers.Siglip2Config(text_config=text, vision_config=VISION)
    model = theirs.build(config, tmp_path / "in", "Siglip2Model", scales=SCALES)
    arrays = pictures([(2, 5), (4, 3)], 14)
    with torch.no_grad():
        expected = model.vision_model(**{k: torch.from_numpy(v) for k, v in arrays.items()}).last_hidden_state
    tower, real = mm_jax.load(tmp_path / "in"), arrays["pixel_attention_mask"] > 0
    ours = np.asarray(tower.apply(tower.params, tower.batch(**arrays)))
    same_features(tower, ours[real], expected.numpy()[real], 2e-5)
    came_back(tower, model, tmp_path / "out")


def test_sizes():
    """Those of the reference, and of squares of patches the same with larger patches."""
    random = np.random.default_rng(0)
    for height, width in [*random.integers(1, 2000, (200, 2)).tolist(), (1, 2000), (16, 16), (4096, 64)]:
        for most in (16, 256, 729):
            expected = reference.get_image_size_for_max_num_patches(height, width, 16, most)
            assert naflex_size(height, width, 16, most) == expected


def rule(merge: int = 1, **settings) -> NaflexRule:
    given = transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=50, **settings).to_dict()
    return NaflexRule(
        Settings(image=given), tokens={"image": 9}, layout=PatchLayout(merge, 0, 4, True), patch=4, frames=1,
        axes=False, defaults={}, video_defaults={}, boxes=BOXES,
    )  # fmt: skip


def test_preprocessing():
    """Patches, masks and shapes of odd sizes, to the bit, alone and together."""
    processor = transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=50)
    images = [image for image in hosts.pictures().values() if image.mode == "RGB"]
    for some in [*([image] for image in images), images]:
        ours = rule().images([np.asarray(image) for image in some])
        expected = processor(images=some, return_tensors="np")
        assert ours.keys() == expected.keys()
        for name, array in ours.items():
            assert np.array_equal(array, expected[name]), name
    note("siglip2_vision_model", "preprocessing", 0.0)
    as_they_are = rule(do_resize=False).images([np.asarray(hosts.picture(17, 9))])
    assert as_they_are["spatial_shapes"].tolist() == [[2, 4]]


def test_squares_of_patches():
    """Each token's four patches are neighbours; the places that they are told are those where they stand."""
    mine = rule(merge=2)
    arrays = mine.images([np.asarray(hosts.picture(60, 31))])
    rows, columns = arrays["spatial_shapes"][0].tolist()
    assert rows % 2 == columns % 2 == 0 and rows * columns <= 50
    [item] = mine.items("image", arrays, ())
    assert item.features == len(item.index) == rows * columns // 4
    places = item.arrays["patch_positions"].reshape(-1, 4, 2)
    assert (places - places[:, :1] == [[0, 0], [0, 1], [1, 0], [1, 1]]).all()
    flat = item.arrays["patch_positions"] @ [columns, 1]
    assert np.array_equal(item.arrays["patches"], arrays["pixel_values"][0][flat])


def test_packed_rows(tmp_path):
    """Pictures that share a row do not see each other, whatever is in between."""
    build(tmp_path)
    tower = mm_jax.load(tmp_path)
    arrays = pictures([(4, 4), (2, 7), (1, 9)], 16)
    batch = tower.batch(**arrays)
    alone = np.asarray(tower.apply(tower.params, batch))
    counts = arrays["spatial_shapes"].prod(1)
    random = np.random.default_rng(0)
    row = {name: np.concatenate([x[k, :n] for k, n in enumerate(counts)])[None] for name, x in batch.items()}
    row = {
        name: np.concatenate([x, random.normal(size=(1, 5, *x.shape[2:])).astype(x.dtype)], 1)
        for name, x in row.items()
    }
    row["patch_segment_ids"] = np.concatenate([np.repeat([1, 2, 3], counts), np.zeros(5, int)])[None].astype(
        np.int32
    )
    together = np.asarray(tower.apply(tower.params, row))[0]
    for k, start in enumerate(np.cumsum([0, *counts])[:-1]):
        assert np.abs(together[start : start + counts[k]] - alone[k, : counts[k]]).max() <= 1e-5


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(spatial_shapes=np.array([[3, 3], [9, 9]])), "more patches than the 16"),
        (dict(spatial_shapes=np.array([[3, 3]])), r"spatial_shapes \[1, 2\]; \[pictures, patches, 48\]"),
        (dict(pixel_attention_mask=np.ones((2, 16), int)), "pixel_attention_mask is not that"),
    ],
)
def test_wrong_arrays(change, message, tmp_path):
    build(tmp_path)
    with pytest.raises(mm_jax.UserError, match=message):
        mm_jax.load(tmp_path).batch(**pictures([(3, 3), (2, 2)], 16) | change)


@pytest.mark.parametrize(
    "change, message", [(dict(num_patches=50), "num_patches"), (dict(rope=True), "rope")]
)
def test_fields_that_change_numbers(change, message):
    with pytest.raises(mm_jax.UserError, match=message):
        tower_of(VISION | change, "config.json")
