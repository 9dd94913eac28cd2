"""Clips for encoders of any number of frames or samples, with the numerics of the reference's feature extractors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mm_jax.data.audio import mel_filters
from mm_jax.data.media_rule import Arrays
from mm_jax.data.mel_rule import RATE, MelAudio
from mm_jax.errors import UserError

Extract = Callable[[np.ndarray], np.ndarray]  # float32 [T] -> float32 [frames, channels]
GUARD, EPSILON = 2.0**-24, 1e-5
MEL = {"feature_size": 80, "hop_length": 160, "n_fft": 512, "win_length": 400, "preemphasis": 0.97}


def waveform(settings: Mapping[str, Any]) -> Extract:
    """The samples themselves, of zero mean and unit variance (reference: Wav2Vec2FeatureExtractor)."""

    def extract(samples: np.ndarray) -> np.ndarray:
        if settings.get("do_normalize", True):
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        return samples.astype(np.float32)[:, None]

    return extract


def normalised_mel(settings: Mapping[str, Any]) -> Extract:
    """Log-mel frames of emphasised samples, each band of zero mean and unit variance over the clip (reference:
    ParakeetFeatureExtractor)."""
    values = MEL | {k: v for k, v in settings.items() if k in MEL and v is not None}
    size, hop, width = values["n_fft"], values["hop_length"], values["win_length"]
    before = (size - width) // 2
    window = np.pad(np.hanning(width), (before, size - width - before))
    filters = mel_filters(RATE, size, values["feature_size"])

    def extract(samples: np.ndarray) -> np.ndarray:
        samples = samples.astype(np.float64)
        if values["preemphasis"]:
            samples = np.append(samples[:1], samples[1:] - values["preemphasis"] * samples[:-1])
        pieces = np.lib.stride_tricks.sliding_window_view(np.pad(samples, size // 2), size)[::hop]
        frames = max(len(samples) // hop, 1)
        power = np.abs(np.fft.rfft(pieces[:frames] * window, axis=1)) ** 2
        mel = np.log(power @ filters + GUARD)
        spread = mel.std(axis=0, ddof=1) if frames > 1 else 0.0
        return ((mel - mel.mean(axis=0)) / (spread + EPSILON)).astype(np.float32)

    return extract


class FrameAudio(MelAudio):
    """`MelAudio` for encoders that hear no silence: a window has as many frames as there are, and what is longer than
    one goes on in the next.

    `shape` is (channels, frames) of a window; one channel is the waveform.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.names = {"audio": ("input_features", "feature_attention_mask", "windows_of_clips")}

    def audio(self, clips: Sequence[np.ndarray]) -> Arrays:
        settings, (channels, size) = self.settings.need("audio"), self.shape
        if (rate := settings.get("sampling_rate", RATE)) != RATE:
            raise UserError(
                f"{self.settings.where}: sampling_rate is {rate}, which is not supported; {RATE} is"
            )
        extract = (waveform if channels == 1 else normalised_mel)(settings)
        windows, counts = [], []
        for clip in clips:
            frames = extract(clip)
            if frames.shape[1] != channels:
                raise UserError(
                    f"{self.settings.where}: frames have {frames.shape[1]} channels, the encoder takes {channels}"
                )
            parts = np.split(frames, range(size, len(frames), size))
            counts.append(len(parts))
            windows += parts
        real = np.array([len(part) for part in windows])
        values = np.stack([np.pad(part, ((0, size - len(part)), (0, 0))).T for part in windows])
        return {
            "input_features": values,
            "feature_attention_mask": (np.arange(size) < real[:, None]).astype(np.int32),
            "windows_of_clips": np.array(counts, np.int32),
        }
