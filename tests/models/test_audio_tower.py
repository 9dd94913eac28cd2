"""The audio encoder: positions, convolutions, and frames that are not there."""

import jax
import numpy as np
import pytest
import reference

from mm_jax.models import AudioEncoder, AudioEncoderConfig
from mm_jax.models.layers import sinusoids

CONFIG = AudioEncoderConfig(num_mels=5, max_frames=12, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=24)


@pytest.fixture(scope="module")
def params() -> dict:
    return reference.draw(AudioEncoder(CONFIG), sound(), np.array([12, 12]))


apply = jax.jit(lambda params, *arrays: AudioEncoder(CONFIG).apply({"params": params}, *arrays))


def sound(seed: int = 0, clips: int = 2, frames: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(clips, frames, 5)).astype(np.float32)


def test_sinusoids_by_literal_example():
    """Two channels of frequency 1 and 1/10000, sines in front of cosines."""
    expected = [[0, 0, 1, 1], [np.sin(1), np.sin(1e-4), np.cos(1), np.cos(1e-4)]]
    np.testing.assert_allclose(sinusoids(2, 4), expected, atol=1e-7)


def test_sinusoids_are_those_of_whisper():
    """Position t, channel k < C/2: sin(t / 10000^(k / (C/2 - 1))); whisper/model.py, `sinusoids`."""
    table = sinusoids(30, 12)
    assert table.dtype == np.float32 and table.shape == (30, 12)
    for t in range(30):
        for k in range(6):
            angle = t / 10_000 ** (k / 5)
            assert table[t, k] == pytest.approx(np.sin(angle), abs=1e-6)
            assert table[t, 6 + k] == pytest.approx(np.cos(angle), abs=1e-6)


def test_num_positions():
    assert CONFIG.num_positions == 6


def test_convolutions_and_positions(params):
    """Kernel 3, one frame of zeros on each side, stride 2 in the second: position t is centred on frame 2t."""

    def convolve(p, x, stride):
        x = np.pad(x, ((0, 0), (1, 1), (0, 0)))
        at = range(0, x.shape[1] - 2, stride)
        return np.stack(
            [np.einsum("nkc,kcd->nd", x[:, t : t + 3], p["kernel"]) + p["bias"] for t in at], axis=1
        )

    bare = jax.tree_util.tree_map_with_path(
        lambda path, x: np.zeros_like(x) if path[-2].key in ("out", "down") else x, params["layers"]
    )
    values = sound()
    x = reference.gelu_tanh(convolve(params["conv1"], values.astype(np.float64), 1))
    x = reference.gelu_tanh(convolve(params["conv2"], x, 2)) + sinusoids(6, 16)
    expected = reference.layer_norm(x, params["norm"]["scale"], params["norm"]["bias"], eps=1e-5)
    found = apply({**params, "layers": bare}, values, np.array([12, 12]))
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("frames", [1, 4, 7, 11])
def test_frames_past_the_end_do_not_matter(params, frames):
    values, count = sound(), np.array([frames, 12])
    values[0, frames:] = 0
    expected = apply(params, values, count)
    garbage = values.copy()
    garbage[0, frames:] = 100 * sound(9)[0, frames:]
    np.testing.assert_array_equal(apply(params, garbage, count), expected)
    # while a real frame does
    values[0, frames - 1] += 1
    assert np.abs(np.asarray(apply(params, values, count) - expected)[0]).max() > 1e-3


@pytest.mark.parametrize("frames", [5, 8])
def test_a_longer_window_changes_nothing(params, frames):
    values = sound(clips=1)
    values[:, frames:] = 0
    longer = np.pad(values, ((0, 0), (0, 8), (0, 0)))
    real = (frames + 1) // 2
    short = apply(params, values, np.array([frames]))[:, :real]
    np.testing.assert_allclose(apply(params, longer, np.array([frames]))[:, :real], short, atol=1e-5)


def test_a_slot_without_a_clip_is_finite(params):
    assert np.isfinite(apply(params, np.zeros((1, 12, 5), np.float32), np.array([0]))).all()
