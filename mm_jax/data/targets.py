"""Dense targets for encoder training: the label words at each patch or moment, and the box it lies in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from einops import rearrange

from mm_jax.data.image import Transform
from mm_jax.data.messages import Region
from mm_jax.errors import UserError

CENTRE = "_centre"  # the label word of the patch in the middle of a region: one patch for every thing
NAMES = 4  # at most, of one media token
COVERED = 0.25  # part of a patch, or of a region, that must overlap


@dataclass(frozen=True)
class TargetRule:
    """labels: the label words that are predicted (others are ignored); empty: filled in by fit_processor.

    box_bins: bins of a coordinate over 0..1 of the model's picture. image_grid: (rows, columns) of patches.
    image_block: patches that one media token stands for (the projector's merge), for naming stages.
    audio_positions: time steps of an audio window that the encoder puts out.
    """

    labels: tuple[str, ...] = ()
    box_bins: int = 64
    image_grid: tuple[int, int] = (8, 8)
    image_block: tuple[int, int] = (1, 1)
    audio_positions: int = 80

    def __post_init__(self) -> None:
        if min(self.box_bins, *self.image_grid, *self.image_block, self.audio_positions) < 1:
            raise UserError(
                "targets box_bins, image_grid, image_block and audio_positions must be at least 1"
            )

    def image(self, regions: Sequence[Region], transform: Transform) -> tuple[np.ndarray, np.ndarray]:
        """Regions in original pixels to (labels uint8 [rows * cols, L], boxes int32 [rows * cols, 4]).

        A region marks a patch whose centre it holds, or of which it covers a quarter, or that holds a quarter
        of the region. A patch carries every word of every region that marks it, and the box of the smallest
        one: x0, y0, x1, y1 as bins floor(v * box_bins), -1 where there is none. What lies outside the picture
        does not count. The patch in the middle of a region carries the word `CENTRE` as well.
        """
        rows, columns = self.image_grid
        boxes = [transform.forward(region.box) for region in regions]
        seen = [k for k, (x0, y0, x1, y1) in enumerate(boxes) if x1 > x0 and y1 > y0]
        if not seen:
            return (
                np.zeros((rows * columns, len(self.labels)), np.uint8),
                np.full((rows * columns, 4), -1, np.int32),
            )
        box = np.array([boxes[k] for k in seen])  # [R, 4]
        x0, y0, x1, y1 = (box * [columns, rows, columns, rows]).T[:, :, None]  # [R, 1] in patches
        wide, wide_centre = _overlap(x0, x1, columns)
        tall, tall_centre = _overlap(y0, y1, rows)
        shared = tall[:, :, None] * wide[:, None, :]  # [R, rows, columns], in patch areas
        area = (x1 - x0) * (y1 - y0)  # [R, 1]
        marked = shared >= np.minimum(COVERED, COVERED * area)[:, :, None]
        marked |= tall_centre[:, :, None] & wide_centre[:, None, :]
        marked = marked.reshape(len(seen), rows * columns)
        labels = _any(marked, _words(tuple(regions[k].label for k in seen), self.labels))
        if CENTRE in self.labels:
            middle_x = np.clip((x0 + x1) / 2, 0, columns - 1).astype(int)
            middle_y = np.clip((y0 + y1) / 2, 0, rows - 1).astype(int)
            labels[middle_y * columns + middle_x, self.labels.index(CENTRE)] = 1
        smallest = np.where(marked, area, np.inf).argmin(0)
        bins = np.minimum((box * self.box_bins).astype(np.int32), self.box_bins - 1)
        return labels, np.where(marked.any(0)[:, None], bins[smallest], -1)

    def audio(self, regions: Sequence[Region], windows: int, window_seconds: float) -> np.ndarray:
        """Regions in seconds of the clip to uint8 [windows, audio_positions, L]: the words at each moment.

        A position stands for its middle time; a word shorter than a step marks the position it falls on.
        """
        count = windows * self.audio_positions
        kept = [region for region in regions if region.box[1] > region.box[0]]
        if not kept:
            return np.zeros((windows, self.audio_positions, len(self.labels)), np.uint8)
        start, end = np.array([region.box for region in kept]).T[:, :, None] * (
            self.audio_positions / window_seconds
        )
        middle = np.arange(count) + 0.5
        marked = (start <= middle) & (middle < end)
        marked |= (np.floor((start + end) / 2) == np.arange(count)) & ~marked.any(1, keepdims=True)
        labels = _words(tuple(region.label for region in kept), self.labels)
        return _any(marked, labels).reshape(windows, self.audio_positions, len(self.labels))


def token_names(
    labels: np.ndarray, grid: tuple[int, int], block: tuple[int, int], ids: np.ndarray
) -> np.ndarray:
    """What may be said of each media token: the labels of the cells behind it as token ids.

    Args:
      labels: uint8 [n, rows * cols, L]; the positions of a clip are a grid of one column.
      grid: (rows, columns) of cells.
      block: (rows, columns) of cells that the projector merges into one token.
      ids: int32 [L], the id of each label's name, -1 for a label that is none.

    Returns:
      int32 [n, tokens, NAMES], -1 where there are fewer.
    """
    (a, b), w = block, grid[1] // block[1]
    merged = rearrange(labels, "n (h a w b) l -> n (h w) (a b) l", a=a, b=b, w=w)
    found = (merged.max(2) > 0) & (ids >= 0)
    order = np.argsort(~found, axis=-1, kind="stable")[..., :NAMES]
    names = np.where(np.take_along_axis(found, order, axis=-1), ids[order], -1).astype(np.int32)
    return np.pad(names, [(0, 0), (0, 0), (0, NAMES - names.shape[-1])], constant_values=-1)


def _overlap(low: np.ndarray, high: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Spans [R, 1] against unit cells: shared length [R, count], and whether the span holds the middle."""
    cells = np.arange(count)
    shared = np.clip(np.minimum(high, cells + 1) - np.maximum(low, cells), 0, 1)
    return shared, (low <= cells + 0.5) & (cells + 0.5 < high)


def _any(marked: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Places [R, P] and words [R, L] of regions to uint8 [P, L]."""
    # float32 goes through BLAS, boolean products do not
    return (marked.T.astype(np.float32) @ labels > 0).astype(np.uint8)


@lru_cache(maxsize=4096)
def _words(names: tuple[str, ...], labels: tuple[str, ...]) -> np.ndarray:
    """Words of the regions' labels, float32 [R, L]."""
    found = np.zeros((len(names), len(labels)), np.float32)
    index = {word: k for k, word in enumerate(labels)}
    for row, name in enumerate(names):
        for word in name.split():
            if word in index:
                found[row, index[word]] = 1
    return found
