"""Where the patches of pictures and videos of any size stand in a row, and where their tokens stand in the text.

A *grid* is (frames, rows, columns) of patches; a picture has one frame. Patches come frame by frame, and within a frame
square by square: the merge x merge patches that become one token stand next to each other, the squares row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange

from mm_jax.errors import UserError

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class PatchLayout:
    """What the vision tower says about the order of patches.

    Attributes:
      merge: side in patches of the square that becomes one token.
      window: side in patches of an attention window, a multiple of merge; 0: there are none.
      table_side: side of the learned table of positions; 0: there is none.
      smooth: it is stretched with antialiasing, see `table_shares`.
    """

    merge: int
    window: int = 0
    table_side: int = 0
    smooth: bool = False

    @property
    def block(self) -> int:
        """Slots come in multiples of this."""
        return (self.window or self.merge) ** 2

    def num_tokens(self, grid: Grid) -> int:
        """Tokens of a picture or video."""
        return grid[0] * (grid[1] // self.merge) * (grid[2] // self.merge)

    def num_slots(self, grid: Grid) -> int:
        """Slots of a picture or video: its patches, and the padding of windows that it fills in part."""
        if not self.window:
            return grid[0] * grid[1] * grid[2]
        return grid[0] * -(-grid[1] // self.window) * -(-grid[2] // self.window) * self.window**2

    def most_slots(self, patches: int) -> int:
        """Slots of a picture of at most so many patches: those of thin ones leave windows empty."""
        if not self.window:
            return patches // self.block * self.block
        sides = range(self.merge, max(int(patches**0.5), self.merge) + 1, self.merge)
        return max(self.num_slots((1, rows, patches // rows)) for rows in sides)

    def arrays(self, values: int) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """(name, trailing shape, dtype) of what the tower takes, for patches of so many values."""
        names = [
            ("patches", (values,), "float32"),
            ("patch_segment_ids", (), "int32"),
            ("patch_positions", (2,), "int32"),
        ]
        if self.smooth:
            names.append(("patch_table_weights", (2, self.table_side), "float32"))
        elif self.table_side:
            names += [("patch_table_index", (4,), "int32"), ("patch_table_weights", (4,), "float32")]
        return tuple(names)


@dataclass(frozen=True)
class Placed:
    """The patches of one picture or video in their slots (P of them, F = P / merge**2).

    Attributes:
      order: int32 [P], the number of the patch in a slot, -1 for padding.
      frames: int32 [P], its frame from 1 on, 0 for padding.
      positions: int32 [P, 2], its row and column.
      table_index, table_weights: int32, float32 [P, 4], see `table_mix`; None without a table. Of a smooth one None and
        float32 [P, 2, side], see `table_shares`.
      features: int32 [tokens], the feature, of 0 to F - 1, that each token takes.
    """

    order: np.ndarray
    frames: np.ndarray
    positions: np.ndarray
    table_index: np.ndarray | None
    table_weights: np.ndarray | None
    features: np.ndarray


def place(grid: Grid, layout: PatchLayout) -> Placed:
    """Slots for a picture or video.

    With windows, each window has window**2 slots of its own, filled from the first on, so that attention within
    windows is a reshape; those at the edges of a picture may be filled in part.

    Raises UserError for a grid that cannot be merged.
    """
    frames, rows, columns = (int(n) for n in grid)
    m = layout.merge
    if min(frames, rows, columns) < 1 or rows % m or columns % m:
        raise UserError(f"a grid of {frames} x {rows} x {columns} patches cannot be merged {m} x {m}")
    squares = rearrange(
        np.arange(frames * rows * columns), "(t h w s) -> t h w s", t=frames, h=rows // m, s=m * m
    )
    if layout.window:
        k = layout.window // m
        padding = [(0, 0), (0, -squares.shape[1] % k), (0, -squares.shape[2] % k), (0, 0)]
        windows = np.pad(squares, padding, constant_values=-1)
        windows = rearrange(windows, "t (h a) (w b) s -> (t h w) (a b) s", a=k, b=k)
        filled_first = np.argsort(windows[..., :1] < 0, axis=1, kind="stable")
        squares = np.take_along_axis(windows, filled_first, axis=1)
    order = squares.reshape(-1).astype(np.int32)
    patch = np.maximum(order, 0)
    frame, within = np.divmod(patch, rows * columns)
    square, inner = np.divmod(within, m * m)
    row = square // (columns // m) * m + inner // m
    column = square % (columns // m) * m + inner % m
    index = weights = None
    if layout.smooth:
        weights = table_shares(row, column, (rows, columns), layout.table_side)
    elif layout.table_side:
        index, weights = table_mix(row, column, (rows, columns), layout.table_side)
    heads = order[:: m * m]  # the first patch of each feature's square
    features = np.argsort(np.where(heads < 0, order.size, heads), kind="stable")[: layout.num_tokens(grid)]
    return Placed(
        order,
        np.where(order >= 0, frame + 1, 0).astype(np.int32),
        np.stack([row, column], axis=-1).astype(np.int32),
        index,
        weights,
        features.astype(np.int32),
    )


def table_mix(
    row: np.ndarray, column: np.ndarray, size: tuple[int, int], side: int
) -> tuple[np.ndarray, np.ndarray]:
    """How a side x side table is stretched over size = (rows, columns), bilinearly, corners on corners.

    Returns:
      int32 [P, 4], entries of the table for each patch, and float32 [P, 4], their weights.
    """

    def ends(index: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        place = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(length - 1, 1))
        low = np.floor(place).astype(np.int32)
        share = place - low
        return np.stack([low, np.minimum(low + 1, side - 1)], -1), np.stack([1 - share, share], -1)

    (rows, row_weights), (columns, column_weights) = ends(row, size[0]), ends(column, size[1])
    index = rearrange(rows[:, :, None] * side + columns[:, None, :], "p a b -> p (a b)")
    weights = rearrange(row_weights[:, :, None] * column_weights[:, None, :], "p a b -> p (a b)")
    return index.astype(np.int32), weights.astype(np.float32)


def table_shares(row: np.ndarray, column: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    """How a side x side table is stretched over size = (rows, columns), bilinearly with antialiasing, pixel centres on
    pixel centres (reference: Siglip2VisionEmbeddings.resize_positional_embeddings).

    Returns:
      float32 [P, 2, side], what each patch takes of each row and of each column of the table.
    """

    def shares(index: np.ndarray, length: int) -> np.ndarray:
        scale = np.float32(side) / np.float32(length)
        centre = (index.astype(np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
        distance = np.abs(np.arange(side, dtype=np.float32) - centre[:, None]) / max(scale, np.float32(1))
        found = np.maximum(1 - distance, 0)
        return found / found.sum(-1, keepdims=True)

    return np.stack([shares(row, size[0]), shares(column, size[1])], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Medium:
    """One picture or video.

    Attributes:
      patches: float [frames * rows * columns, values of a patch].
      step: positions from one frame of a video to the next.
    """

    patches: np.ndarray
    grid: Grid
    step: float = 1.0


def slots(medium: Medium, layout: PatchLayout) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of one picture or video, named as in `PatchLayout.arrays` with a leading axis of slots, and int32
    [tokens], the feature that each of its tokens takes."""
    p = place(medium.grid, layout)
    real = p.order >= 0
    arrays = {
        "patches": np.zeros((len(real), medium.patches.shape[1]), np.float32),
        "patch_segment_ids": p.frames,
        "patch_positions": p.positions,
    }
    arrays["patches"][real] = medium.patches[p.order[real]]
    if layout.table_side:
        arrays["patch_table_weights"] = p.table_weights
    if p.table_index is not None:
        arrays["patch_table_index"] = p.table_index
    return arrays, p.features


def positions(pictured: np.ndarray, media: Sequence[Medium], merge: int) -> np.ndarray:
    """Positions of text and media tokens along time, rows and columns (M-RoPE; Qwen2-VL section 2.1).

    Text moves along all three at once. Media tokens count from where their run starts, and text goes on behind the
    largest position so far. The frames of a video may come in several runs (with their times written in between,
    Qwen3-VL); each run then starts anew.

    Args:
      pictured: bool [T], which tokens are of pictures and videos.
      media: pictures and videos in the order of their tokens.

    Returns:
      int32 [T, 3].

    Raises UserError when the runs of media tokens are not those of the media.
    """
    out = np.zeros((len(pictured), 3), np.int32)
    left = [medium.grid[0] for medium in media]  # frames
    place = current = 0
    for start, stop in runs(pictured):
        if not pictured[start]:
            out[start:stop] = (place + np.arange(stop - start))[:, None]
            place += stop - start
            continue
        while start < stop:
            if current == len(media):
                raise UserError("there are more media tokens than pictures and videos")
            _, rows, columns = media[current].grid
            size = (rows // merge, columns // merge)
            count = min(left[current], (stop - start) // (size[0] * size[1]))
            if count == 0:
                raise UserError(
                    f"a run of media tokens ends {stop - start} tokens into a frame of {size[0]} x {size[1]}"
                )
            grid = np.stack(np.indices((count, *size)), axis=-1).reshape(-1, 3)
            grid[:, 0] = (grid[:, 0].astype(np.float32) * np.float32(media[current].step)).astype(np.int64)
            out[start : start + len(grid)] = grid + place
            place += int(grid.max()) + 1
            start += len(grid)
            left[current] -= count
            current += left[current] == 0
    if current < len(media):
        raise UserError("there are fewer media tokens than pictures and videos")
    return out


def runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and end of each run of equal values."""
    ends = np.flatnonzero(np.diff(flags)) + 1
    yield from zip([0, *ends.tolist()], [*ends.tolist(), len(flags)], strict=True) if len(flags) else ()
