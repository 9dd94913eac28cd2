"""Muon: orthogonal steps for the matrices inside the model, AdamW for the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mm_jax.train.config import OptimizerConfig
from mm_jax.train.optimizer import hidden_matrices, optimizer, tree_bytes

CONFIG = OptimizerConfig("muon", learning_rate=0.01, warmup_steps=0, weight_decay=0.0, clip_norm=1e9)
SHAPES = {
    "decoder": {"embedding": {"embedding": (12, 8)}, "layers": {"mlp": {"up": {"kernel": (3, 8, 16)}}}},
    "image_projector": {"out": {"kernel": (8, 8), "bias": (8,)}},
    "vision": {"patch_embed": {"kernel": (8, 8)}, "stem_conv0": {"kernel": (3, 3, 3, 8)}},
    "heads": {"image_labels": {"kernel": (8, 4)}},
}


def tree(seed: int) -> dict:
    random = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def test_which_parameters_are_matrices() -> None:
    found = hidden_matrices(tree(0))
    axes = found["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert (axes.reduction_axis, axes.output_axis) == (1, 2)
    assert found["image_projector"]["out"]["kernel"] is not None
    leaves = jax.tree.leaves(found, is_leaf=lambda x: x is None or hasattr(x, "output_axis"))
    assert sum(leaf is not None for leaf in leaves) == 2


def test_steps_of_a_stack_are_orthogonal_layer_by_layer() -> None:
    params, grads = tree(0), tree(1)
    transform = optimizer(CONFIG, 100)
    updates, _ = transform.update(grads, transform.init(params), params)
    for step in updates["decoder"]["layers"]["mlp"]["up"]["kernel"]:
        values = np.linalg.svd(np.asarray(step), compute_uv=False)
        # Newton-Schulz of five steps brings singular values near 1, not onto it (Jordan et al. 2024)
        assert values.max() / values.min() < 2
        assert np.sqrt(np.mean(np.square(step))) == pytest.approx(0.2 * 0.01, rel=0.3)


def test_the_rest_moves_as_with_adamw() -> None:
    """With Nesterov's look ahead, as the matrices."""
    params, grads = tree(0), tree(1)
    muon, adamw = optimizer(CONFIG, 100), optax.adamw(0.01, b1=0.9, b2=0.98, weight_decay=0.0, nesterov=True)
    ours, _ = muon.update(grads, muon.init(params), params)
    theirs, _ = adamw.update(grads, adamw.init(params), params)
    for path in (("vision", "patch_embed"), ("heads", "image_labels"), ("decoder", "embedding")):
        a, b = ours[path[0]][path[1]], theirs[path[0]][path[1]]
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)
    assert not np.allclose(
        ours["image_projector"]["out"]["kernel"], theirs["image_projector"]["out"]["kernel"]
    )


def test_one_moment_instead_of_two_for_matrices() -> None:
    params = tree(0)
    matrices = 4 * (3 * 8 * 16 + 8 * 8)
    states = {
        kind: optimizer(dataclasses.replace(CONFIG, kind=kind), 9).init(params) for kind in ("muon", "adamw")
    }
    saved = tree_bytes(states["adamw"]) - tree_bytes(states["muon"])
    assert abs(saved - matrices) <= 32  # and counters and coefficients


def test_it_descends() -> None:
    target, params = tree(2), tree(0)
    transform = optimizer(dataclasses.replace(CONFIG, learning_rate=0.2), 60)
    state = transform.init(params)
    loss = lambda p: sum(jnp.mean(jnp.square(a - b)) for a, b in zip(  # noqa: E731
        jax.tree.leaves(p), jax.tree.leaves(target), strict=True))  # fmt: skip

    @jax.jit
    def step(params, state):
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before = float(loss(params))
    for _ in range(60):
        params, state = step(params, state)
    assert float(loss(params)) < 0.2 * before
