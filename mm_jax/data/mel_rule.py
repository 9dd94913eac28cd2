"""Clips as windows of log-mel features with the numerics of transformers' WhisperFeatureExtractor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_jax.data.audio import log_mel
from mm_jax.data.media_rule import Arrays, Item, MediaRule, Settings
from mm_jax.errors import UserError

DEFAULTS = {"feature_size": 80, "sampling_rate": 16_000, "hop_length": 160, "chunk_length": 30, "n_fft": 400}
RATE = 16_000  # Hz; the reference's filters end at 8 kHz whatever the rate


@dataclass(frozen=True)
class MelRule:
    """Settings of a WhisperFeatureExtractor; window is in samples."""

    num_mels: int
    n_fft: int
    hop_length: int
    window: int

    @property
    def frames(self) -> int:
        """Of a window."""
        return self.window // self.hop_length

    @classmethod
    def read(cls, settings: Mapping[str, Any], where: str = "preprocessor_config.json") -> MelRule:
        """From the fields of preprocessor_config.json. Raises UserError for values that are not supported."""
        values = {**DEFAULTS, **{k: v for k, v in settings.items() if v is not None}}
        for name, only in (
            ("sampling_rate", RATE),
            ("padding_value", 0),
            ("dither", 0),
            ("padding_side", "right"),
        ):
            if values.get(name, only) != only:
                raise UserError(f'{where}: "{name}" is {values[name]!r}, which is not supported; {only!r} is')
        window = values["chunk_length"] * values["sampling_rate"]
        return cls(values["feature_size"], values["n_fft"], values["hop_length"], window)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """float32 [T] -> float32 [num_mels, T // hop_length]."""
        return log_mel(samples, RATE, self.n_fft, self.hop_length, self.num_mels).T


class MelAudio(MediaRule):
    """Clips for encoders of Whisper's shape.

    Args:
      token_id: of the token that stands for one audio feature.
      shape: (mels, frames) of the encoder's window.
      num_tokens: features that a window gives.
      tokens_of: features behind so many real frames; None where the silence that fills a window up counts as well.
        Then a clip of any length becomes as many windows as it needs, with the features of the whole clip; otherwise
        what is longer than a window is cut off, as in the reference.
      all_frames: the encoder hears the silence as well, of which no token is made.
    """

    sample_rate = RATE

    def __init__(
        self,
        settings: Settings,
        *,
        token_id: int,
        shape: tuple[int, int],
        num_tokens: int,
        tokens_of: Callable[[int], int] | None = None,
        all_frames: bool = False,
    ):
        super().__init__(settings)
        self.tokens = {"audio": token_id}
        self.shape, self.num_tokens, self.tokens_of = shape, num_tokens, tokens_of
        self.all_frames = all_frames
        # windows_of_clips is ours: how many of the windows belong to each clip
        self.names = {
            "audio": ("input_features", "feature_attention_mask" if tokens_of else "windows_of_clips")
        }

    def audio(self, clips: Sequence[np.ndarray]) -> Arrays:
        rule = MelRule.read(self.settings.need("audio"), f"{self.settings.where}/preprocessor_config.json")
        if (rule.num_mels, rule.frames) != self.shape:
            raise UserError(
                f"{self.settings.where}: preprocessor_config.json makes windows of {rule.num_mels} mel bands x "
                f"{rule.frames} frames, the encoder of config.json takes {self.shape[0]} x {self.shape[1]}"
            )
        if self.tokens_of is None:
            counts = [max(-(-len(clip) // rule.window), 1) for clip in clips]
            whole = [rule(_filled(clip, n * rule.window)) for clip, n in zip(clips, counts, strict=True)]
            windows = [
                part for mel, n in zip(whole, counts, strict=True) for part in np.split(mel, n, axis=1)
            ]
            return {"input_features": np.stack(windows), "windows_of_clips": np.array(counts, np.int32)}
        real = [-(-min(len(clip), rule.window) // rule.hop_length) for clip in clips]
        mask = (np.arange(rule.frames) < np.array(real)[:, None]).astype(np.int32)
        features = np.stack([rule(_filled(clip, rule.window)) for clip in clips])
        return {"input_features": features, "feature_attention_mask": mask}

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        if "input_features" not in arrays:
            raise UserError(f"{', '.join(arrays)} is there, but no input_features")
        values, mask = arrays["input_features"], arrays.get("feature_attention_mask")
        if values.ndim != 3 or values.shape[1:] != self.shape:
            raise UserError(
                f"input_features has shape {list(values.shape)}, [clips, {self.shape[0]}, {self.shape[1]}] is needed"
            )
        windows = len(values)
        if self.tokens_of is None:
            frames = np.full(windows, self.shape[1])
        else:
            if mask is None or mask.shape != (windows, self.shape[1]):
                raise UserError(
                    f"feature_attention_mask [{windows}, {self.shape[1]}] is needed with input_features"
                )
            frames = mask.sum(axis=1)
        each = arrays.get("windows_of_clips", np.ones(windows, np.int32))
        if each.ndim != 1 or each.sum() != windows or (each < 1).any():
            raise UserError(f"windows_of_clips is {each.tolist()}, but there are {windows} windows")
        values = np.ascontiguousarray(values.transpose(0, 2, 1), np.float32)
        items, at = [], 0
        for count in each:
            part = slice(at, at + count)
            index = [
                np.arange(self.tokens_of(int(real)) if self.tokens_of else self.num_tokens)
                + k * self.num_tokens
                for k, real in enumerate(frames[part])
            ]
            heard = np.full(count, self.shape[1]) if self.all_frames else frames[part]
            slots = {"audio_values": values[part], "audio_frames": heard.astype(np.int32)}
            items.append(Item(np.concatenate(index).astype(np.int32), count * self.num_tokens, slots))
            at += count
        return items


def _filled(samples: np.ndarray, length: int) -> np.ndarray:
    """The first `length` samples, or zeros behind fewer."""
    return np.pad(samples[:length], (0, max(length - len(samples), 0)))
