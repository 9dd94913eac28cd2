"""Tensors of the reference that hold several parameters of ours."""

import numpy as np
import pytest

from mm_jax.families.family import LINEAR, Part, Weight

BLOCKS = [Weight("qkv", name, LINEAR, part=Part(4 * k, 4 * k + 4, 12)) for k, name in enumerate("qkv")]
PER_HEAD = [
    Weight("qkv", name, "s n h i -> i (s n h)", (("s", 1), ("n", 2)),
           Part(k, k + 1, 3, "(n s h) i -> s n h i", (("n", 2), ("s", 3))))
    for k, name in enumerate("qkv")
]  # fmt: skip
GROUPED = [  # two query heads, a key and a value for each of two groups
    Weight("wqkv", name, "s g h -> (g s h)", (("g", 2), ("h", 3)),
           Part(*ends, 4, "(g s h) -> s g h", (("g", 2), ("s", 4))))
    for name, ends in (("q", (0, 2)), ("k", (2, 3)), ("v", (3, 4)))
]  # fmt: skip


@pytest.mark.parametrize("weights, shape", [(BLOCKS, (12, 5)), (PER_HEAD, (12, 5)), (GROUPED, (24,))])
def test_there_and_back(weights, shape):
    theirs = np.random.default_rng(0).normal(size=shape)
    ours = [weight.ours(theirs) for weight in weights]
    parts = [weight.theirs(array) for weight, array in zip(weights, ours, strict=True)]
    for weight, array in zip(weights, ours, strict=True):
        assert weight.their_shape(array.shape) == shape
        assert np.array_equal(weight.joined(parts), theirs)


def test_by_literal_example():
    rows = np.arange(12)[:, None] + np.zeros(5)
    assert [w.ours(rows)[0].tolist() for w in BLOCKS] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [w.ours(rows)[0].tolist() for w in PER_HEAD] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    queries, keys, _ = (w.ours(np.arange(24)).tolist() for w in GROUPED)
    assert queries == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert keys == [6, 7, 8, 18, 19, 20]
