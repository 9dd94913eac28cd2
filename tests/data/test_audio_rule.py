"""Log-mel numbers written by transformers 5.23 WhisperFeatureExtractor, and how clips become windows."""

import numpy as np
import pytest

from mm_jax.data.audio import AudioRule, log_mel, mel_filters
from mm_jax.errors import UserError

# WhisperFeatureExtractor(feature_size=8), n_samples=16000, of half a second of a rising tone
WHISPER = {
    0: [0.607806, -0.744671, -0.744671, -0.744671, -0.744671, -0.744671, -0.744671, -0.744671],
    10: [1.206144, -0.288888, -0.744671, -0.744671, -0.744671, -0.744671, -0.744671, -0.744671],
    30: [1.092677, 1.236582, 0.229869, -0.744671, -0.744671, -0.744671, -0.744671, -0.744671],
    49: [0.172511, 0.987585, 1.240526, 0.571364, -0.070769, -0.253912, -0.399447, -0.509615],
    51: [0.173186, 0.286787, 0.331744, 0.185373, -0.071889, -0.253843, -0.399439, -0.509614],
    99: [-0.744671, -0.744671, -0.744671, -0.744671, -0.744671, -0.744671, -0.744671, -0.744671],
}
FILTERS = {
    1: [0.000356, 0, 0, 0, 0, 0, 0, 0],
    10: [0.002406, 0.000577, 0, 0, 0, 0, 0, 0],
    60: [0, 0, 0, 0, 0.000744, 0.000474, 0, 0],
    150: [0, 0, 0, 0, 0, 0, 0, 0.000429],
}


def tone() -> np.ndarray:
    time = np.arange(8000) / 16000
    return (0.5 * np.sin(2 * np.pi * 1000 * time * time)).astype(np.float32)


def test_numbers_of_the_reference():
    rule = AudioRule(num_mels=8, max_frames=100, num_tokens=7)
    ((mel, frames),) = rule(tone())
    assert (mel.shape, mel.dtype, frames) == ((100, 8), np.float32, 50)
    for row, values in WHISPER.items():
        np.testing.assert_allclose(mel[row], values, atol=2e-6)
    for row, values in FILTERS.items():
        np.testing.assert_allclose(mel_filters(16000, 400, 8)[row], values, atol=6e-7)


@pytest.mark.parametrize("silent", [0, 100, 3000, 7999])
def test_skipping_silence_changes_nothing(silent):
    samples = np.concatenate([tone()[: 8000 - silent], np.zeros(silent, np.float32)])
    padded = np.pad(samples, 200, mode="reflect").astype(np.float64)
    window = np.hanning(401)[:-1]
    pieces = np.stack([padded[t * 160 : t * 160 + 400] for t in range(50)])
    power = np.abs(np.fft.rfft(pieces * window)) ** 2
    log_spec = np.log10(np.maximum(power @ mel_filters(16000, 400, 8), 1e-10))
    expected = (np.maximum(log_spec, log_spec.max() - 8) + 4) / 4
    np.testing.assert_allclose(log_mel(samples, 16000, 400, 160, 8), expected, atol=1e-6)


def test_silence_is_flat():
    np.testing.assert_array_equal(log_mel(np.zeros(1600, np.float32), 16000, 400, 160, 8), -1.5)


def test_long_clips_become_windows():
    rule = AudioRule()  # windows of 1.6 s, 16 frames a token
    windows = rule(np.random.default_rng(0).normal(size=16000 * 4).astype(np.float32))
    assert [(mel.shape, frames) for mel, frames in windows] == [
        ((160, 80), 160),
        ((160, 80), 160),
        ((160, 80), 80),
    ]
    assert [rule.tokens(frames) for _, frames in windows] == [10, 10, 5]
    assert AudioRule(frames_per_token=None, num_tokens=4).tokens(3) == 4


def test_the_floor_is_of_each_window():
    loud = np.concatenate([tone(), 1e-4 * tone()])
    rule = AudioRule(max_frames=50, frames_per_token=None)
    (first, _), (second, _) = rule(loud)
    np.testing.assert_array_equal(first, rule(tone())[0][0])
    np.testing.assert_array_equal(second, rule(1e-4 * tone())[0][0])


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (160, 1), (161, 2), (25600, 160)])
def test_frames(samples, frames):
    ((_, found),) = AudioRule()(np.ones(samples, np.float32))
    assert found == frames


def test_bad_rules():
    with pytest.raises(UserError, match="160 frames / 8 = 20 tokens but num_tokens is 10"):
        AudioRule(frames_per_token=8)
    with pytest.raises(UserError, match="sample_rate"):
        AudioRule(sample_rate=100)
    with pytest.raises(UserError, match="at least 1"):
        AudioRule(hop_length=0)
    with pytest.raises(UserError, match="longer than"):
        AudioRule(max_frames=1, frames_per_token=None)
