"""The step: what it moves, accumulation, recompilation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.errors import UserError
from mm_jax.train import losses, partition
from mm_jax.train.config import OptimizerConfig
from mm_jax.train.optimizer import decay_mask, optimizer, schedule, tree_bytes
from mm_jax.train.state import TrainState
from mm_jax.train.step import make_step

VOCAB, WIDTH = 11, 8


def apply(params: dict, batch: dict, method: str | None = None) -> jax.Array:
    x = params["decoder"]["embedding"][batch["tokens"]]
    x = jnp.tanh(x @ params["audio"]["kernel"] + params["audio_projector"]["bias"])
    return x @ params["decoder"]["head"]


def params() -> dict:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "decoder": {
            "embedding": jax.random.normal(keys[0], (VOCAB, WIDTH)),
            "head": jax.random.normal(keys[1], (WIDTH, VOCAB)),
        },
        "audio": {"kernel": jax.random.normal(keys[2], (WIDTH, WIDTH))},
        "audio_projector": {"bias": jnp.ones(WIDTH)},
    }


def batch(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (rows, 6)
    return {
        "tokens": rng.integers(0, VOCAB, shape).astype(np.int32),
        "segment_ids": rng.integers(0, 3, shape).astype(np.int32),
        "sources": np.zeros(shape, np.int32),
        # Rows of very different weight: averaging micro-batch losses would not give the same gradients.
        "loss_weights": (rng.random(shape) * np.arange(1, rows + 1)[:, None]).astype(np.float32),
    }


def start(trainable: tuple[str, ...], accumulate: int = 1) -> tuple:
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.1)
    transform = optimizer(config, 10)
    moving, frozen = partition.split(params(), trainable)
    state = TrainState(jnp.int32(0), moving, transform.init(moving), jax.random.key(0))
    step = make_step(apply, losses.next_token(("a",)), transform, schedule(config, 10), accumulate)
    return step, state, frozen


def test_accumulated_micro_batches_equal_one_big_batch() -> None:
    big = batch(4)
    parts = {name: x.reshape(2, 2, *x.shape[1:]) for name, x in big.items()}
    results = []
    for arrays, accumulate in ((big, 1), (parts, 2)):
        step, state, frozen = start(("decoder", "audio"), accumulate)
        state, metrics = step(state, frozen, arrays)
        results.append((state.trainable, metrics))
    (one, one_metrics), (two, two_metrics) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, two)
    assert one_metrics.keys() == two_metrics.keys()
    for name in one_metrics:
        np.testing.assert_allclose(one_metrics[name], two_metrics[name], rtol=1e-5, err_msg=name)


def test_frozen_parts_stay_and_have_no_optimizer_state() -> None:
    step, state, frozen = start((".*_projector",))
    before = jax.tree.map(np.asarray, frozen)
    # two moments of 8 float32, and the step counters of adam and of the schedule
    assert tree_bytes(state.opt_state) == 2 * WIDTH * 4 + 2 * 4
    for seed in range(3):
        state, _ = step(state, frozen, batch(2, seed))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, frozen))
    assert sorted(state.trainable) == ["audio_projector"]
    assert not np.array_equal(state.trainable["audio_projector"]["bias"], np.ones(WIDTH))
    assert int(state.step) == 3


def test_one_compilation_for_many_batches() -> None:
    step, state, frozen = start(("decoder",))
    for seed in range(4):
        state, _ = step(state, frozen, batch(2, seed))
    assert step._cache_size() == 1


def test_split_matches_whole_components_and_join_restores() -> None:
    trainable, frozen = partition.split(params(), ("audio",))
    assert sorted(trainable) == ["audio"]  # not audio_projector
    assert sorted(frozen) == ["audio_projector", "decoder"]
    joined = partition.join(trainable, frozen)
    jax.tree.map(np.testing.assert_array_equal, joined, params())


@pytest.mark.parametrize("pattern", ["decoder/hed", "vision"])
def test_a_pattern_without_a_parameter_is_an_error(pattern: str) -> None:
    with pytest.raises(UserError, match=f'"{pattern}" matches no parameter'):
        partition.split(params(), ("audio", pattern))


def test_decay_spares_norms_biases_embeddings() -> None:
    tree = {
        "layers": {"attention_norm": {"scale": jnp.ones((2, 4))}, "mlp": {"bias": jnp.ones((2, 4))}},
        "embedding": {"embedding": jnp.ones((3, 4))},
        "positions": jnp.ones((3, 4)),
        "patch_embed": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
    }
    assert decay_mask(tree) == {
        "layers": {"attention_norm": {"scale": False}, "mlp": {"bias": False}},
        "embedding": {"embedding": False},
        "positions": False,
        "patch_embed": {"kernel": True, "bias": False},
    }


def test_schedule_warms_up_and_decays() -> None:
    rates = schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_fraction=0.1), 104)
    np.testing.assert_allclose([rates(0), rates(1), rates(3), rates(4)], [0.25, 0.5, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose([rates(54), rates(104)], [0.55, 0.1], rtol=1e-5)


def test_schedule_holds_the_rate_before_it_falls() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_fraction=0.1, decay_fraction=0.4)
    rates = schedule(config, 100)
    np.testing.assert_allclose([rates(step) for step in (0, 3, 59, 60)], [0.25, 1.0, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose([rates(80), rates(100)], [0.55, 0.1], rtol=1e-5)
    at_once = schedule(replace(config, warmup_steps=0, decay_fraction=1.0), 100)
    np.testing.assert_allclose([at_once(0), at_once(50), at_once(100)], [1.0, 0.55, 0.1], rtol=1e-5)
