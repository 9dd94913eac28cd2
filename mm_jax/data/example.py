"""One conversation as arrays of any length: what the packer packs.

Keys of a packed batch (a plain dict of numpy arrays; B rows, S merged length, N picture slots and M audio
windows a row, G preference pairs a row). The features of a row are laid out
[pictures: N * image.num_tokens | windows: M * audio.num_tokens].

    tokens, segment_ids, positions, media_index, sources   int32 [B, S]
        segment 0 is padding, k the k-th conversation of the row; media_index -1 is text, -2 - k the model's k-th
        learned marker, else a feature's row. positions may have axes: [B, S, axes]
    blocks              int32 [B, S]     tokens that see each other whatever their order; some families only
    loss_weights        float32 [B, S]   belongs to the prediction of the token at the same place
    pixel_values        float32 [B, N, H, W, 3];  image_segment_ids int32 [B, N] (0: unused slot)
        or, where the image encoder takes other arrays, those of `Layout.slot_arrays` with leading [B, N]; for an
        encoder of native resolution (patches, patch_segment_ids, ...) a slot is one patch
    media_taps, tap_weights   int32, float32 [B, S, TAPS], where `Layout.taps`: a media token takes a mixture of
                        features, at these distances from its media_index and with these weights
    seen                int8 [B, S, N * shares], where `Layout.shares`: what a token has to do with each share of the
                        row's pictures: 0 nothing, 1 it sees it, 2 it attends to it, but sees nothing
    audio_values        float32 [B, M, F, mels];  audio_frames, audio_segment_ids int32 [B, M] (0: unused)
    image_labels, image_boxes, audio_labels   the arrays of Example with leading [B]; dense stage only
    names               int32 [B, S, NAMES]  what a media token shows, as token ids, -1 for none; naming stages only
    preference          int32 [B, G]     index of the pair or -1; preference stage only. Pair g of a row has
                                         the segments 2g + 1 (chosen) and 2g + 2 (rejected)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mm_jax.data.image import Transform

TAPS = 4  # of a bilinear mixture


@dataclass(frozen=True)
class Example:
    """One tokenised conversation (T tokens, n pictures, m audio windows, L label words).

    segments: 1; in a preference pair 1 = chosen, 2 = rejected, and both take their media from the same slots.
    positions restart with each segment. loss_weights[t] belongs to the prediction of tokens[t].
    image_index, audio_index: slot * num_tokens + k where a media feature goes, -2 - k for a learned marker, else -1.
    """

    tokens: np.ndarray  # int32 [T]
    loss_weights: np.ndarray  # float32 [T]
    segments: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [T], or [T, axes]
    image_index: np.ndarray  # int32 [T]
    audio_index: np.ndarray  # int32 [T]
    pixel_values: np.ndarray  # float32 [n, H, W, 3]
    audio_values: np.ndarray  # float32 [m, F, mels]
    audio_frames: np.ndarray  # int32 [m]
    transforms: list[Transform] = field(default_factory=list)  # n
    image_labels: np.ndarray | None = None  # uint8 [n, rows * cols, L]
    image_boxes: np.ndarray | None = None  # int32 [n, rows * cols, 4], -1 where no region is
    audio_labels: np.ndarray | None = None  # uint8 [m, audio_positions, L]
    names: np.ndarray | None = None  # int32 [T, NAMES], -1 for none
    source: str = ""
    id: str = ""
    preference: int = -1  # index of the pair, set by whoever numbers the pairs
    taps: tuple[np.ndarray, np.ndarray] | None = None  # int32, float32 [T, TAPS]; None: one feature a token
    seen: np.ndarray | None = None  # int8 [T, n * shares]
    slots: dict[str, np.ndarray] = field(default_factory=dict)  # [n, ...] each, see `image_arrays`

    @property
    def length(self) -> int:
        """Merged length T."""
        return len(self.tokens)

    @property
    def image_arrays(self) -> dict[str, np.ndarray]:
        """What the image encoder takes, by name, with a leading axis of slots."""
        return self.slots or {"pixel_values": self.pixel_values}

    @property
    def num_images(self) -> int:
        """Picture slots."""
        return len(next(iter(self.image_arrays.values())))

    @property
    def num_audio(self) -> int:
        return len(self.audio_values)
