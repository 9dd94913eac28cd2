"""Features of clips for encoders of any length, against transformers' extractors, and their windows."""

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

from mm_jax.data.frame_rule import FrameAudio, normalised_mel, waveform  # noqa: E402
from mm_jax.data.media_rule import Settings  # noqa: E402


def clip(length: int, seed: int = 0) -> np.ndarray:
    time = np.arange(length) / 16_000
    noise = np.random.default_rng(seed).normal(size=length)
    return (0.3 * np.sin(2 * np.pi * 440 * time) + 0.05 * noise + 0.02).astype(np.float32)


@pytest.mark.parametrize("length", [400, 4801, 16_000])
@pytest.mark.parametrize("options", [{}, dict(n_fft=400, win_length=320, preemphasis=0.5)])
def test_mel_is_the_reference_s(length, options):
    extractor = transformers.ParakeetFeatureExtractor(feature_size=16, **options)
    theirs = extractor(clip(length), sampling_rate=16_000, return_tensors="np")
    expected = theirs["input_features"][0][theirs["attention_mask"][0].astype(bool)]
    ours = normalised_mel(extractor.to_dict())(clip(length))
    assert ours.shape == expected.shape == (length // 160, 16)
    assert (
        np.abs(ours - expected).max() < 2e-3
    )  # they compute in float32, and the spread of two frames may be small


@pytest.mark.parametrize("normalise", [True, False])
def test_waveform_is_the_reference_s(normalise):
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise)
    expected = extractor(clip(5000), sampling_rate=16_000, return_tensors="np")["input_values"][0]
    assert np.abs(waveform(extractor.to_dict())(clip(5000))[:, 0] - expected).max() < 1e-5


def test_long_clips_take_several_windows():
    rule = FrameAudio(
        Settings(audio={"do_normalize": False}), token_id=7, shape=(1, 1000), num_tokens=10,
        tokens_of=lambda frames: -(-frames // 100),
    )  # fmt: skip
    long, short = clip(2350), clip(120, seed=1)
    arrays = rule.audio([long, short])
    assert arrays["input_features"].shape == (4, 1, 1000)
    first, second = rule.items("audio", arrays, ())
    assert first.arrays["audio_frames"].tolist() == [1000, 1000, 350]
    assert first.index.tolist() == [*range(24)] and first.features == 30
    heard = np.concatenate([v[:n, 0] for v, n in zip(*first.arrays.values(), strict=True)])
    assert np.array_equal(heard, long)
    assert second.index.tolist() == [0, 1] and second.arrays["audio_frames"].tolist() == [120]
