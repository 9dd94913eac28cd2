"""Samples to log-mel windows with the numerics of transformers' WhisperFeatureExtractor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mm_jax.errors import UserError


def _hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Slaney's mel scale (Auditory Toolbox): linear below 1000 Hz, logarithmic above."""
    hz = np.asarray(hz, np.float64)
    return np.where(hz < 1000, 3 * hz / 200, 15 + np.log(np.maximum(hz, 1e-9) / 1000) * (27 / np.log(6.4)))


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp(np.log(6.4) / 27 * (mel - 15)))


@lru_cache(maxsize=8)
def mel_filters(sample_rate: int, n_fft: int, num_mels: int) -> np.ndarray:
    """Triangular filters [n_fft // 2 + 1, num_mels] float64 of equal area (slaney), 0 Hz to half the rate."""
    bins = np.linspace(0, sample_rate // 2, n_fft // 2 + 1)
    edges = _mel_to_hz(np.linspace(_hz_to_mel(0.0), _hz_to_mel(sample_rate / 2), num_mels + 2))
    slopes = edges[None] - bins[:, None]
    down, up = -slopes[:, :-2] / np.diff(edges)[:-1], slopes[:, 2:] / np.diff(edges)[1:]
    return np.maximum(0, np.minimum(down, up)) * (2 / (edges[2:] - edges[:-2]))[None]


@lru_cache(maxsize=8)
def _window(n_fft: int) -> np.ndarray:
    """Periodic Hann window [n_fft]."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)


def log_mel(samples: np.ndarray, sample_rate: int, n_fft: int, hop_length: int, num_mels: int) -> np.ndarray:
    """Samples [T] float32 to log-mel features [T // hop_length, num_mels] float32, about -1.5..1.5.

    Frames are centred with reflected edges, the last one is dropped; log10 of at least 1e-10, floored at 8
    below the loudest value of these samples, then (x + 4) / 4 (WhisperFeatureExtractor, transformers).

    Frames of pure silence are not transformed but filled in, so padding costs nothing.
    """
    half = n_fft // 2
    frames = len(samples) // hop_length
    loud = np.flatnonzero(samples)
    heard = min(frames, (int(loud[-1]) + half) // hop_length + 1) if len(loud) else 0
    # the reflected end is heard again behind the last sample
    if len(loud) and loud[-1] + half >= len(samples) - half:
        heard = frames
    log_spec = np.full((frames, num_mels), -10.0)
    if heard:
        padded = np.pad(samples, half, mode="reflect").astype(np.float64)
        pieces = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[: heard * hop_length : hop_length]
        spectrum = np.fft.rfft(pieces * _window(n_fft), axis=1)
        power = spectrum.real**2 + spectrum.imag**2
        mel = power @ mel_filters(sample_rate, n_fft, num_mels)
        log_spec[:heard] = np.log10(np.maximum(mel, 1e-10))
    log_spec = np.maximum(log_spec, log_spec.max() - 8.0)
    return ((log_spec + 4.0) / 4.0).astype(np.float32)


@dataclass(frozen=True)
class AudioRule:
    """How a clip becomes windows of log-mel features [max_frames, num_mels], and the tokens they take.

    sample_rate in Hz; n_fft and hop_length in samples; a window is max_frames * hop_length samples.
    frames_per_token: mel frames behind one pseudo-token, so a short clip takes few; None: every window takes
    num_tokens (a projector with learned queries). num_tokens is also a window's room in the feature row.
    """

    sample_rate: int = 16000
    num_mels: int = 80
    n_fft: int = 400
    hop_length: int = 160
    max_frames: int = 160
    num_tokens: int = 10
    frames_per_token: int | None = 16

    def __post_init__(self) -> None:
        if not 4000 <= self.sample_rate <= 384000:
            raise UserError(f"audio sample_rate must be 4000..384000 Hz, not {self.sample_rate}")
        if min(self.num_mels, self.n_fft, self.hop_length, self.max_frames, self.num_tokens) < 1:
            raise UserError("audio num_mels, n_fft, hop_length, max_frames and num_tokens must be at least 1")
        if self.max_frames * self.hop_length <= self.n_fft // 2:
            raise UserError("an audio window (max_frames * hop_length samples) must be longer than n_fft / 2")
        if self.frames_per_token is not None:
            if self.frames_per_token < 1:
                raise UserError("audio frames_per_token must be at least 1, or None for learned queries")
            if self.tokens(self.max_frames) > self.num_tokens:
                full = f"{self.max_frames} frames / {self.frames_per_token} = {self.tokens(self.max_frames)}"
                raise UserError(f"a full audio window has {full} tokens but num_tokens is {self.num_tokens}")

    @property
    def window_seconds(self) -> float:
        return self.max_frames * self.hop_length / self.sample_rate

    def __call__(self, waveform: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """Mono samples [T] at sample_rate to windows in a row: (mel float32 [max_frames, num_mels], frames).

        The samples of the last window are padded with zeros; `frames` says how many of its frames are real.
        """
        size = self.max_frames * self.hop_length
        windows = []
        for start in range(0, len(waveform), size):
            piece = waveform[start : start + size]
            frames = -(-len(piece) // self.hop_length)
            if len(piece) < size:
                piece = np.concatenate([piece, np.zeros(size - len(piece), np.float32)])
            mel = log_mel(piece, self.sample_rate, self.n_fft, self.hop_length, self.num_mels)
            windows.append((mel, frames))
        return windows

    def tokens(self, frames: int) -> int:
        """Pseudo-tokens of a window with that many real frames."""
        return self.num_tokens if self.frames_per_token is None else -(-frames // self.frames_per_token)
