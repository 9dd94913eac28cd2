"""What first-fit packing promises, for random sizes."""

import numpy as np
import pytest

from mm_jax.data.packing import BatchConfig, FirstFitPacker


@pytest.mark.parametrize("seed", range(20))
def test_no_row_exceeds_a_budget_and_nothing_is_lost(seed):
    random = np.random.default_rng(seed)
    budget = random.integers([8, 1, 1, 1], [80, 9, 5, 5])
    length, images, audio, pairs = (int(n) for n in budget)
    bins = int(random.integers(1, 9))
    batch = BatchConfig(1, length, images=images, audio=audio, pairs=pairs, bins=bins)
    # among them items that fill a whole row, and items that take nothing of a medium
    sizes = random.integers([1, 0, 0, 0], budget + 1, (500, 4))
    small = random.random(500) < 0.7
    sizes[small] = np.maximum(sizes[small] // 4, [1, 0, 0, 0])
    packer, finished = FirstFitPacker(batch), []
    for item, size in enumerate(sizes.tolist()):
        waiting = [list(row) for row in packer.rows]
        row = packer.add(item, size)
        assert len(packer.rows) <= bins
        fits = [(sizes[old].sum(0) + size <= budget).all() for old in waiting]
        if any(fits):  # the first row with room takes it
            assert row is None and packer.rows[fits.index(True)] == [*waiting[fits.index(True)], item]
        else:
            assert packer.rows[-1] == [item] and (row is not None) == (len(waiting) == bins)
        finished += [row] if row is not None else []
    rows = finished + packer.rows
    assert sorted(item for row in rows for item in row) == list(range(500))
    for row in rows:
        assert row == sorted(row)  # items of a row keep their order
        assert (sizes[row].sum(0) <= budget).all()
