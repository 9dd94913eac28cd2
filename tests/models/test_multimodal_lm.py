"""MultimodalLM on packed rows: what stands beside a conversation never changes what the model says in it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mm_jax.data.example import Example
from mm_jax.data.packing import BatchConfig, Layout, collate
from mm_jax.models import (
    AudioEncoderConfig,
    DecoderConfig,
    MultimodalConfig,
    MultimodalLM,
    ProjectorConfig,
    ViTConfig,
    splice,
)

IMAGE_TOKENS, AUDIO_TOKENS = 2, 3
LAYOUT = Layout(IMAGE_TOKENS, (8, 12), AUDIO_TOKENS, (12, 5))
ROW = BatchConfig(rows=1, length=40, images=5, audio=3)
PROJECTORS = {
    "mlp": (ProjectorConfig("mlp", (1, 3), hidden_dim=20), ProjectorConfig("linear", (2, 1))),
    "resampler": tuple(
        ProjectorConfig("resampler", hidden_dim=16, num_queries=n, num_heads=2)
        for n in (IMAGE_TOKENS, AUDIO_TOKENS)
    ),
}


def config_of(kind: str = "mlp", **changes) -> MultimodalConfig:
    image, audio = PROJECTORS[kind]
    return MultimodalConfig(
        vision=ViTConfig(8, 12, 4, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16),
        audio=AudioEncoderConfig(5, 12, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16),
        image_projector=image,
        audio_projector=audio,
        decoder=DecoderConfig(
            31, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24
        ),
        **changes,
    )


@functools.cache
def make(kind: str = "mlp"):
    """(model, params, jitted forward pass)"""
    model = MultimodalLM(config_of(kind))
    assert (model.config.image_tokens, model.config.audio_tokens) == (IMAGE_TOKENS, AUDIO_TOKENS)
    params = reference.draw(model, packed([EXAMPLES["pictures"], EXAMPLES["sounds"]]))
    return model, params, jax.jit(lambda params, batch: model.apply({"params": params}, batch))


def conversation(parts: str, seed: int) -> Example:
    """One letter a part: t a token of text, i a picture, a a clip of its own length."""
    random = np.random.default_rng(seed)
    image_index, audio_index, frames = [], [], []
    images = 0
    for part in parts:
        count = {"t": 1, "i": IMAGE_TOKENS, "a": AUDIO_TOKENS}[part]
        none = [-1] * count
        image_index += [images * IMAGE_TOKENS + k for k in range(count)] if part == "i" else none
        audio_index += [len(frames) * AUDIO_TOKENS + k for k in range(count)] if part == "a" else none
        images += part == "i"
        frames += [int(random.integers(3, 12))] if part == "a" else []
    length = len(image_index)
    audio = random.normal(size=(len(frames), 12, 5))
    for clip, count in zip(audio, frames, strict=True):
        clip[count:] = 0
    return Example(
        tokens=random.integers(1, 31, length).astype(np.int32),
        loss_weights=np.ones(length, np.float32),
        segments=np.ones(length, np.int32),
        positions=np.arange(length, dtype=np.int32),
        image_index=np.array(image_index, np.int32),
        audio_index=np.array(audio_index, np.int32),
        pixel_values=random.normal(size=(images, 8, 12, 3)).astype(np.float32),
        audio_values=audio.astype(np.float32),
        audio_frames=np.array(frames, np.int32),
        source="a",
    )


EXAMPLES = {
    "pictures": conversation("titittt", 1),
    "text": conversation("ttttt", 2),
    "sounds": conversation("tattatt", 3),
    "both": conversation("iatti", 4),
}


def packed(examples, batch: BatchConfig = ROW) -> dict[str, np.ndarray]:
    rows = examples if isinstance(examples[0], list) else [examples]
    return collate(rows, dataclasses.replace(batch, rows=len(rows)), LAYOUT, {"a": 0})


@pytest.mark.parametrize("kind", PROJECTORS)
def test_packed_equals_unpacked(kind):
    """Four conversations with four pictures and three clips in one row; then each alone in a row."""
    _, params, apply = make(kind)
    batch = packed(list(EXAMPLES.values()))
    assert batch["segment_ids"].max() == 4
    assert (batch["image_segment_ids"] > 0).sum() == 4 and (batch["audio_segment_ids"] > 0).sum() == 3
    logits, start = apply(params, batch)[0], 0
    for name, example in EXAMPLES.items():
        alone = apply(params, packed([example]))[0, : example.length]
        assert np.abs(alone).max() > 1
        found = logits[start : start + example.length]
        np.testing.assert_allclose(found, alone, atol=1e-5, rtol=1e-5, err_msg=name)
        start += example.length


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_medium_matters_where_it_stands(kind):
    """Without this, `packed == unpacked` would hold for a model that ignores its media."""
    _, params, apply = make(kind)
    batch = packed(list(EXAMPLES.values()))
    before = np.asarray(apply(params, batch))[0]
    segments = batch["segment_ids"][0]
    for key in ("pixel_values", "audio_values"):
        owners = batch["image_segment_ids" if key == "pixel_values" else "audio_segment_ids"][0]
        for slot in np.flatnonzero(owners):
            values = batch[key].copy()
            values[0, slot, :3] *= -1  # the first rows of pixels, or frames
            moved = np.abs(np.asarray(apply(params, {**batch, key: values}))[0] - before).max(-1)
            assert moved[segments == owners[slot]].max() > 1e-2
            assert moved[segments != owners[slot]].max() == 0


def test_batch_equals_single():
    """Rows of different lengths and media: as many slots as the fullest row needs, or as each row needs."""
    _, params, apply = make()
    batch = packed([[example] for example in EXAMPLES.values()])
    logits = apply(params, batch)
    for row, example in enumerate(EXAMPLES.values()):
        own = BatchConfig(1, example.length, images=example.num_images, audio=example.num_audio)
        alone = apply(params, packed([example], own))
        assert ("pixel_values" in packed([example], own)) == (example.num_images > 0)
        np.testing.assert_allclose(alone[0], logits[row, : example.length], atol=1e-5, rtol=1e-5)


def test_a_text_row_is_the_same_with_and_without_slots():
    _, params, apply = make()
    beside = apply(params, packed([[EXAMPLES["text"]], [EXAMPLES["both"]]]))[0]
    alone = apply(params, packed([EXAMPLES["text"]], BatchConfig(1, 40)))[0]
    length = EXAMPLES["text"].length
    np.testing.assert_allclose(beside[:length], alone[:length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_what_lies_in_unused_slots_does_not_matter(kind):
    _, params, apply = make(kind)
    batch = packed([EXAMPLES["both"], EXAMPLES["text"]])
    expected = np.asarray(apply(params, batch))
    random = np.random.default_rng(0)
    used_images, used_clips = EXAMPLES["both"].num_images, EXAMPLES["both"].num_audio
    garbage = {key: value.copy() for key, value in batch.items()}
    garbage["pixel_values"][:, used_images:] = 50 * random.normal(
        size=garbage["pixel_values"][:, used_images:].shape
    )
    garbage["audio_values"][:, used_clips:] = 50 * random.normal(
        size=garbage["audio_values"][:, used_clips:].shape
    )
    garbage["audio_frames"][:, used_clips:] = [7, 12]
    np.testing.assert_array_equal(apply(params, garbage), expected)
    # and what stands behind the end of a clip
    frames = int(batch["audio_frames"][0, 0])
    garbage["audio_values"][0, 0, frames:] = 9
    np.testing.assert_array_equal(apply(params, garbage), expected)


def test_splice_by_literal_example():
    embeddings = jnp.asarray([[[0.0], [1], [2], [3]], [[4], [5], [6], [7]]])
    features = jnp.asarray([[[10.0], [11], [12]], [[20], [21], [22]]])
    index = np.array([[-1, 0, 1, -1], [2, -1, -1, 2]], np.int32)
    assert splice(embeddings, features, index)[..., 0].tolist() == [[0, 10, 11, 3], [22, 5, 6, 22]]


def test_features_of_a_row_are_its_pictures_then_its_clips():
    model, params, _ = make()
    batch = packed([[EXAMPLES["both"]], [EXAMPLES["sounds"]]])

    @jax.jit
    def encode(params, batch):
        return model.apply({"params": params}, batch, method="encode")

    features = np.asarray(encode(params, batch))
    assert features.shape == (2, 5 * IMAGE_TOKENS + 3 * AUDIO_TOKENS, 16)
    pictures = {k: v for k, v in batch.items() if not k.startswith("audio")}
    sounds = {k: v for k, v in batch.items() if k != "pixel_values"}
    np.testing.assert_allclose(features[:, :10], encode(params, pictures), atol=1e-6)
    np.testing.assert_allclose(features[:, 10:], encode(params, sounds), atol=1e-6)
    # slot s of a medium has the rows s * tokens ... : exchanged pictures exchange their features
    exchanged = {**pictures, "pixel_values": pictures["pixel_values"][:, [1, 0, 2, 3, 4]]}
    order = [2, 3, 0, 1, *range(4, 10)]
    np.testing.assert_allclose(encode(params, exchanged), features[:, order], atol=1e-6)


def test_low_precision_compute_keeps_float32_parameters_and_logits():
    """bfloat16 has 8 bits: logits of a standard deviation near 1.5 agree to some hundredths on average."""
    _, params, apply = make()
    model = MultimodalLM(config_of(dtype="bfloat16"))
    batch = packed(list(EXAMPLES.values()))
    drawn = reference.draw(model, batch)
    assert {x.dtype for x in jax.tree.leaves(drawn)} == {np.dtype("float32")}
    logits = jax.jit(lambda params, batch: model.apply({"params": params}, batch))(params, batch)
    assert logits.dtype == jnp.float32
    errors = np.abs(np.asarray(logits) - np.asarray(apply(params, batch)))[batch["segment_ids"] > 0]
    assert 0 < errors.mean() < 0.05
