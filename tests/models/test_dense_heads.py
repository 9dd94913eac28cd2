"""The heads of the tower stage: affine maps of every position, boxes as four classifications."""

import jax
import numpy as np
import reference

from mm_jax.models import (
    AudioEncoder,
    AudioEncoderConfig,
    DecoderConfig,
    DenseHeads,
    HeadConfig,
    MultimodalConfig,
    MultimodalLM,
    VisionTransformer,
    ViTConfig,
)


def both(heads, features):
    return heads.image(features), heads.audio(features)


def test_equal_the_formula():
    features = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    heads = DenseHeads(HeadConfig(num_labels=4, box_bins=6))
    params = reference.draw(heads, features, method=both)
    image, audio = heads.apply({"params": params}, features, method=both)
    assert set(image) == {"image_labels", "image_boxes"} and set(audio) == {"audio_labels"}
    for name, found in ({**image, **audio}).items():
        expected = reference.dense(params[name], features)
        if name == "image_boxes":
            # the classes of one side stand together: x0 has the first six
            expected = np.stack([expected[..., 6 * side : 6 * side + 6] for side in range(4)], axis=-2)
            assert found.shape == (2, 3, 4, 6)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert found.dtype == np.float32


def test_dense_is_the_heads_over_each_tower():
    config = MultimodalConfig(
        vision=ViTConfig(8, 12, 4, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16),
        audio=AudioEncoderConfig(5, 12, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16),
        decoder=DecoderConfig(31, 16, 1, 2, 1, 8, 16),
        heads=HeadConfig(3, 7),
    )
    random = np.random.default_rng(0)
    batch = {
        "tokens": np.zeros((2, 1), np.int32),
        "pixel_values": random.normal(size=(2, 2, 8, 12, 3)).astype(np.float32),
        "audio_values": random.normal(size=(2, 3, 12, 5)).astype(np.float32),
        "audio_frames": random.integers(1, 13, (2, 3)).astype(np.int32),
    }
    model = MultimodalLM(config)
    params = reference.draw(model, batch, method="dense")
    assert sorted(params) == ["audio", "heads", "vision"]
    found = jax.jit(lambda params, batch: model.apply({"params": params}, batch, method="dense"))(
        params, batch
    )
    heads = DenseHeads(config.heads)
    pictures, clips = (
        batch[key].reshape(-1, *batch[key].shape[2:]) for key in ("pixel_values", "audio_values")
    )
    seen = VisionTransformer(config.vision).apply({"params": params["vision"]}, pictures)
    heard = AudioEncoder(config.audio).apply(
        {"params": params["audio"]}, clips, batch["audio_frames"].ravel()
    )
    expected = heads.apply({"params": params["heads"]}, seen, method="image")
    expected |= heads.apply({"params": params["heads"]}, heard, method="audio")
    shapes = {"image_labels": (2, 2, 6, 3), "image_boxes": (2, 2, 6, 4, 7), "audio_labels": (2, 3, 6, 3)}
    assert {name: x.shape for name, x in found.items()} == shapes
    for name, shape in shapes.items():
        np.testing.assert_allclose(found[name], np.reshape(expected[name], shape), atol=1e-5)
