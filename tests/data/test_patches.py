"""The layout of patches and the positions of their tokens."""

import numpy as np
import pytest

from mm_jax.data.native_pixels import fitting_size, patchify
from mm_jax.data.patches import Medium, PatchLayout, place, positions
from mm_jax.errors import UserError


def medium(*grid: int, step: float = 1.0) -> Medium:
    """Each patch holds its own number."""
    patches = np.arange(np.prod(grid), dtype=np.float32)
    return Medium(patches[:, None], grid, step)


def test_places_by_literal_example():
    """Two by six patches, merged two by two: square by square."""
    placed = place((1, 2, 6), PatchLayout(2))
    assert placed.order.tolist() == list(range(12))
    assert placed.positions[:8].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert placed.features.tolist() == [0, 1, 2] and set(placed.frames) == {1}


def test_windows_have_slots_of_their_own():
    """Two frames of 4 x 6 patches in windows of 4 x 4: the second window of a frame is half full."""
    layout = PatchLayout(2, window=4)
    placed = place((2, 4, 6), layout)
    assert len(placed.order) == layout.num_slots((2, 4, 6)) == 64
    windows = placed.order.reshape(4, 16)
    assert [(w >= 0).sum() for w in windows] == [16, 8, 16, 8]
    assert (windows[1, :8] >= 0).all()
    rows, columns = placed.positions.reshape(4, 16, 2)[1, :8].T
    assert set(rows) == {0, 1, 2, 3} and set(columns) == {4, 5}
    # tokens in reading order: rows of 3, of which two are in the first window of their frame
    assert placed.features.tolist() == [0, 1, 4, 2, 3, 5, 8, 9, 12, 10, 11, 13]


LAYOUTS = [PatchLayout(2), PatchLayout(2, 4), PatchLayout(3, 6, 5), PatchLayout(1, 2, 3)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(8))
def test_every_token_finds_its_square(layout, seed):
    """Whatever the grid: each token's feature is made of the patches that come in its turn, and of no others."""
    random, m = np.random.default_rng(seed), layout.merge
    grid = (int(random.integers(1, 4)), *(int(n) for n in m * random.integers(1, 6, 2)))
    placed = place(grid, layout)
    assert len(placed.order) == layout.num_slots(grid) and len(placed.order) % layout.block == 0
    squares = placed.order.reshape(-1, m * m)
    assert np.array_equal(squares[placed.features], np.arange(np.prod(grid)).reshape(-1, m * m))
    real = placed.order >= 0
    assert real.sum() == np.prod(grid) and np.array_equal(placed.frames > 0, real)
    assert np.array_equal(placed.frames[real] - 1, placed.order[real] // (grid[1] * grid[2]))
    if layout.table_side:
        assert np.allclose(placed.table_weights.sum(-1), 1) and (placed.table_weights >= 0).all()


def test_table_corners():
    """Corners of the picture are corners of the table, and a side of one patch takes the first entry."""
    placed = place((1, 3, 1), PatchLayout(1, table_side=5))
    mixed = (placed.table_index * placed.table_weights).sum(-1)
    assert mixed.tolist() == [0, 10, 20]


def test_positions_by_literal_example():
    """Two words, a picture of 2 x 3 tokens, a word, a video of two frames of 1 x 2 tokens, a word."""
    pictured = np.array([0, 0] + [1] * 6 + [0] + [1] * 4 + [0], bool)
    found = positions(pictured, [medium(1, 4, 6), medium(2, 2, 4, step=2.5)], 2)
    assert found.T.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 8, 8, 9],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 6, 6, 6, 9],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 6, 7, 9],
    ]


def test_frames_apart():
    """The frames of a video with a word in between start anew."""
    pictured = np.array([1, 1, 0, 1, 1, 0], bool)
    found = positions(pictured, [medium(2, 2, 4)], 2)
    assert found.T.tolist() == [[0, 0, 2, 3, 3, 5], [0, 0, 2, 3, 3, 5], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    "pictured, message",
    [
        ([1, 1, 1, 0], "ends 1 tokens into"),
        ([1, 1, 1, 1], "more media tokens"),
        ([0, 0], "fewer media tokens"),
    ],
)
def test_wrong_runs(pictured, message):
    media = [medium(1, 2, 4)] + [medium(1, 2, 4)] * (message == "ends 1 tokens into")
    with pytest.raises(UserError, match=message):
        positions(np.array(pictured, bool), media, 2)


def test_grid_that_cannot_be_merged():
    with pytest.raises(UserError, match="1 x 3 x 4 patches cannot be merged 2 x 2"):
        place((1, 3, 4), PatchLayout(2))


def test_patchify_and_its_grid():
    frames = np.random.default_rng(0).normal(size=(3, 8, 12, 3)).astype(np.float32)
    patches, grid = patchify(frames, 2, 2, 2)
    assert grid == (2, 4, 6) and patches.shape == (48, 3 * 2 * 2 * 2)
    second = patches[1].reshape(3, 2, 2, 2)  # the patch to the right of the first, in both frames
    assert np.array_equal(second, frames[:2, :2, 2:4].transpose(3, 0, 1, 2))
    last = patches[-1].reshape(3, 2, 2, 2)
    assert np.array_equal(last[:, 0], last[:, 1])


def test_sizes():
    assert fitting_size(100, 200, 28, 56 * 56, 28 * 28 * 1280) == (112, 196)
    assert fitting_size(10, 20, 28, 56 * 56, 28 * 28 * 1280) == (56, 84)
    assert fitting_size(3000, 2000, 28, 56 * 56, 28 * 28 * 1280) == (1204, 812)
    with pytest.raises(UserError, match="more than 200 times"):
        fitting_size(1, 201, 28, 1, 10**6)
