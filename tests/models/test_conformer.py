"""The Conformer: distances, fronts, clips of different lengths, and that a model with one learns."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import reference

from mm_jax.models import (
    Conformer,
    ConformerConfig,
    DecoderConfig,
    MelSubsampling,
    MultimodalConfig,
    MultimodalLM,
    ProjectorConfig,
    WaveformConvolutions,
)
from mm_jax.models.conformer import by_distance, distances

SIZES = dict(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, kernel_size=5)
CONFIGS = {
    "mel": ConformerConfig(8, 24, MelSubsampling(4, 6), **SIZES),
    "mel-batch-norm": ConformerConfig(8, 24, MelSubsampling(2, 6), conv_norm="batch", **SIZES),
    "waveform": ConformerConfig(
        1, 120, WaveformConvolutions((6, 8), (4, 3), (3, 2)), positions="rotary", input_norm=True, **SIZES
    ),
    "waveform-every": ConformerConfig(
        1,
        120,
        WaveformConvolutions((6, 8), (4, 3), (3, 2), "every", use_bias=True),
        positions="none",
        **SIZES,
    ),
}


def draw(config: ConformerConfig) -> dict:
    """Random parameters; variances are positive."""
    params = reference.draw(Conformer(config), sound(config), np.array([config.max_frames] * 2))
    norm = params["layers"]["convolution"]["norm"]
    if "var" in norm:
        norm["var"] = 0.5 + np.abs(norm["var"])
    return params


@pytest.fixture(scope="module", params=CONFIGS)
def encoder(request):
    """(config, apply) with random parameters."""
    config = CONFIGS[request.param]
    params, apply = {"params": draw(config)}, jax.jit(Conformer(config).apply)
    return config, lambda *arrays: np.asarray(apply(params, *arrays))


def sound(config: ConformerConfig, seed: int = 0, clips: int = 2) -> np.ndarray:
    size = (clips, config.max_frames, config.num_mels)
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def test_distances_by_literal_example():
    """Distances 2, 1, 0, -1, -2; two channels of frequency 1 and 1/100: sine and cosine in turn."""
    table = distances(3, 4)
    assert table.shape == (5, 4) and table.dtype == np.float32
    for row, distance in zip(table, (2, 1, 0, -1, -2), strict=True):
        expected = [np.sin(distance), np.cos(distance), np.sin(distance / 100), np.cos(distance / 100)]
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_scores_by_distance():
    """Column r of query i is about distance T - 1 - r; key j wants distance i - j."""
    scores = np.random.default_rng(0).normal(size=(2, 3, 4, 7)).astype(np.float32)
    found = np.asarray(by_distance(scores))
    for i in range(4):
        for j in range(4):
            np.testing.assert_array_equal(found[..., i, j], scores[..., i, 3 - (i - j)])


def test_what_lies_past_the_end_does_not_matter(encoder):
    config, apply = encoder
    frames = int(0.55 * config.max_frames)
    real = config.positions_of(frames)
    values, counts = sound(config), np.array([frames, config.max_frames])
    expected = apply(values, counts)
    garbage = values.copy()
    garbage[0, frames:] = 100 * sound(config, 9)[0, frames:]
    np.testing.assert_array_equal(apply(garbage, counts)[0, :real], expected[0, :real])
    np.testing.assert_array_equal(apply(garbage, counts)[1], expected[1])
    alone = apply(values[:1, :frames], np.array([frames]))
    assert alone.shape == (1, real, 16)
    np.testing.assert_allclose(expected[0, :real], alone[0], atol=2e-5)
    # while a real frame does
    values[0, frames - 4] += 1
    assert np.abs(apply(values, counts)[0, :real] - expected[0, :real]).max() > 1e-3


def test_a_slot_without_a_clip_is_finite(encoder):
    config, apply = encoder
    assert np.isfinite(apply(np.zeros_like(sound(config)), np.array([0, 0]))).all()


def test_statistics_of_a_checkpoint_do_not_learn():
    config = CONFIGS["mel-batch-norm"]
    module = Conformer(config)
    inputs = sound(config), np.array([24, 11])
    params = draw(config)
    gradients = jax.grad(lambda p: (module.apply({"params": p}, *inputs) ** 3).sum())(params)
    norm = gradients["layers"]["convolution"]["norm"]
    assert not np.any(norm["mean"]) and not np.any(norm["var"])
    assert np.all(norm["scale"]) and np.all(norm["bias"])


@pytest.mark.parametrize("name", ["mel", "waveform"])
def test_a_model_with_a_conformer_learns_what_it_hears(name):
    """Four clips, four answers, two a row: the loss falls to nothing, which it cannot by text alone."""
    audio = dataclasses.replace(CONFIGS[name], num_layers=1)
    config = MultimodalConfig(
        None,
        audio,
        audio_projector=ProjectorConfig("linear"),
        decoder=DecoderConfig(
            8, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
        ),
    )
    each = config.audio_tokens
    tokens, segments, positions, index = [], [], [], []
    for row in range(2):
        for k in range(2):
            tokens += [[1] * each + [2, 3 + 2 * row + k]]
            segments += [[k + 1] * (each + 2)]
            positions += [list(range(each + 2))]
            index += [[*range(k * each, (k + 1) * each), -1, -1]]
    batch = {
        key: np.array(value, np.int32).reshape(2, -1)
        for key, value in dict(
            tokens=tokens, segment_ids=segments, positions=positions, media_index=index
        ).items()
    }
    batch["audio_values"] = sound(audio, clips=4).reshape(2, 2, audio.max_frames, audio.num_mels)
    full = audio.max_frames
    batch["audio_frames"] = np.array([[full, full // 2], [full - 5, full]], np.int32)
    model = MultimodalLM(config)
    params = model.init(jax.random.key(0), batch)["params"]
    optimizer = optax.adam(5e-3)
    answered = (batch["tokens"] == 2).nonzero()

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = model.apply({"params": params}, batch)[answered]
            targets = batch["tokens"][answered[0], answered[1] + 1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(60):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[0] > 1.0 > 0.1 > losses[-1]
