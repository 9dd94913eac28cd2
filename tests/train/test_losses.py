"""Losses against literal numbers."""

import math
from collections.abc import Iterator

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.train import losses

# Two segments in one row, then padding. Answers: tokens 1 and 2 of the first, token 1 of the second segment.
TOKENS = np.array([[0, 2, 1, 0, 2, 0]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0]], np.int32)
WEIGHTS = np.array([[0.0, 1.0, 0.5, 1.0, 2.0, 1.0]], np.float32)
PROBABILITIES = [
    [[0.2, 0.3, 0.5], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.25, 0.5, 0.25], [0.2, 0.2, 0.6], [0.2, 0.2, 0.6]]
]
LOGITS = np.log(np.array(PROBABILITIES, np.float32)) + 3.0  # any shift is the same distribution


def text_batch() -> dict[str, jnp.ndarray]:
    sources = np.array([[0, 0, 0, 1, 1, 0]], np.int32)
    arrays = {"tokens": TOKENS, "segment_ids": SEGMENTS, "loss_weights": WEIGHTS, "sources": sources}
    return jax.tree.map(jnp.asarray, arrays)


def value(loss: losses.Loss, apply: losses.Apply, batch: dict) -> tuple[float, dict]:
    totals = loss.denominators(batch)
    sums, metrics = loss.numerators(apply, None, batch)
    assert sums.keys() == totals.keys()
    return float(sum(sums[k] / totals[k] for k in sums)), jax.tree.map(np.asarray, metrics)


def test_next_token_pairs_a_token_with_the_logits_before_it_and_never_crosses_segments() -> None:
    # token 1 of segment 1: p = 0.5 (weight 1); token 2: p = 0.8 (weight 0.5); token 1 of segment 2: p = 0.25
    # (weight 2). Not counted: the first token of segment 2 (weight 1, but the logits before it belong to
    # segment 1) and the padding.
    expected = -(np.log(0.5) + 0.5 * np.log(0.8) + 2 * np.log(0.25)) / 3.5
    loss = losses.next_token(("a", "b"))
    found, metrics = value(loss, lambda params, batch: jnp.asarray(LOGITS), text_batch())
    assert found == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(metrics["loss/a"], [-(np.log(0.5) + 0.5 * np.log(0.8)), 1.5], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/b"], [-2 * np.log(0.25), 2.0], rtol=1e-6)
    # the likeliest token was right for 0.5 and 0.8, not for 0.25
    np.testing.assert_allclose(metrics["token_accuracy"], [1.5, 3.5])


def test_naming_asks_the_logits_at_media_tokens_for_what_they_show() -> None:
    """Position 3 may be called 0 or 2 (p = 0.25 each), position 4 is a 2 (p = 0.6); weight 0.5 of their mean."""
    names = np.full((1, 6, 3), -1, np.int32)
    names[0, 3], names[0, 4] = [0, 2, -1], [2, -1, -1]
    batch = text_batch() | {"names": jnp.asarray(names)}
    apply = lambda params, batch: jnp.asarray(LOGITS)  # noqa: E731
    found, metrics = value(losses.next_token(("a", "b"), naming=0.5), apply, batch)
    plain, _ = value(losses.next_token(("a", "b")), apply, batch)
    term = -(np.log(0.25) + np.log(0.6)) / 2
    assert found == pytest.approx(plain + 0.5 * term, rel=1e-6)
    np.testing.assert_allclose(metrics["loss/names"], [2 * term, 2], rtol=1e-6)


def chunk_case() -> tuple[dict, dict]:
    """(params, batch) of a linear model of 8 tokens a row: embedding [11, 6], head [6, 11]."""
    rng = np.random.default_rng(0)
    shape = (2, 8)
    batch = {
        "tokens": rng.integers(0, 11, shape), "sources": rng.integers(0, 2, shape), "names": np.full((*shape, 2), -1),
        "segment_ids": np.array([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2]), "loss_weights": rng.random(shape) + 0.1,
    }  # fmt: skip
    batch["names"][:, 2:4] = [[3, -1], [4, 5]]
    params = {"embedding": rng.normal(size=(11, 6)), "head": rng.normal(size=(6, 11))}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), jax.tree.map(jnp.asarray, batch)


def linear(params: dict, x: dict, method: str | None = None) -> jax.Array:
    if method == "logits":
        return x @ params["head"]
    hidden = jnp.tanh(params["embedding"][x["tokens"]])
    return hidden if method == "hidden" else hidden @ params["head"]


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_give_the_same_loss_and_gradients(chunk: int) -> None:
    params, batch = chunk_case()

    def total(params: dict, chunk: int) -> tuple[jax.Array, dict]:
        sums, metrics = losses.next_token(("a", "b"), 0.5, chunk).numerators(linear, params, batch)
        return sums["loss"] + sums["names"], metrics

    (plain, metrics), expected = jax.value_and_grad(total, has_aux=True)(params, 0)
    (found, ours), grads = jax.value_and_grad(total, has_aux=True)(params, chunk)
    assert float(found) == pytest.approx(float(plain), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), grads, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, metrics)
    assert max(jnp.abs(x).max() for x in jax.tree.leaves(grads)) > 0.1


@pytest.mark.parametrize("chunk", [0, 2])
def test_chunks_never_hold_all_logits(chunk: int) -> None:
    """The largest array anywhere in the gradient's program: [2, 8, 11] logits without chunks, [2, 2, 11] with."""
    params, batch = chunk_case()
    loss = losses.next_token(("a", "b"), chunk=chunk)
    program = jax.make_jaxpr(jax.grad(lambda p: loss.numerators(linear, p, batch)[0]["loss"]))(params)
    largest = max(math.prod(shape) for shape in shapes(program.jaxpr) if shape[-1:] == (11,))
    assert (largest >= 2 * 8 * 11) == (chunk == 0)


def shapes(jaxpr: jax.extend.core.Jaxpr) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from shapes(getattr(inner, "jaxpr", inner))


def test_preference_is_dpo_over_summed_answer_log_probs() -> None:
    batch = text_batch()
    reference = np.array([[[-1.0, -0.5]]], np.float32)
    batch |= {"preference": jnp.array([[0]]), "reference": jnp.asarray(reference)}
    chosen, rejected = np.log(0.5) + np.log(0.8), np.log(0.25)  # sums, whatever the loss weights are
    margin = 0.2 * ((chosen + 1.0) - (rejected + 0.5))
    found, metrics = value(losses.preference(0.2), lambda params, batch: jnp.asarray(LOGITS), batch)
    assert found == pytest.approx(np.log1p(np.exp(-margin)), rel=1e-6)
    np.testing.assert_allclose(metrics["reward_margin"], [margin, 1.0], rtol=1e-5)
    np.testing.assert_allclose(metrics["reward_accuracy"], [1.0, 1.0])


def test_preference_ignores_unused_pairs() -> None:
    batch = text_batch() | {"preference": jnp.array([[0, -1]]), "reference": jnp.zeros((1, 2, 2))}
    one = text_batch() | {"preference": jnp.array([[0]]), "reference": jnp.zeros((1, 1, 2))}
    apply = lambda params, batch: jnp.asarray(LOGITS)  # noqa: E731
    loss = losses.preference(0.1)
    assert value(loss, apply, batch)[0] == pytest.approx(value(loss, apply, one)[0], rel=1e-6)


def label_loss(logits: list[float], labels: list[int], positive_weight: float) -> float:
    """Cross-entropy over the labels and "nothing", right ones sharing equally."""
    every = np.exp([*logits, 0.0])
    log_probs = np.log(every / every.sum())
    if not any(labels):
        return -log_probs[-1]
    return -positive_weight * np.mean([p for p, label in zip(log_probs, labels, strict=False) if label])


def test_dense_averages_over_positions_in_use() -> None:
    # Two picture slots, the second unused; one patch, two labels, two bins; two clips of 2 positions over
    # 4 frames, of which the first clip has 2 frames (position 0 only) and the second none.
    batch = {
        "image_labels": np.array([[[[1, 0]], [[1, 1]]]], np.uint8),
        "image_boxes": np.array([[[[1, 0, -1, 1]], [[0, 0, 0, 0]]]], np.int32),
        "image_segment_ids": np.array([[1, 0]], np.int32),
        "audio_labels": np.array([[[[0, 1], [1, 1]], [[1, 1], [1, 1]]]], np.uint8),
        "audio_frames": np.array([[2, 0]], np.int32),
        "audio_values": np.zeros((1, 2, 4, 3), np.float32),
    }
    boxes = np.log(np.array([[0.4, 0.6], [0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], np.float32))
    outputs = {
        "image_labels": np.array([[[[0.5, -1.0]], [[3.0, 3.0]]]], np.float32),
        "image_boxes": np.stack([boxes, boxes])[None, :, None],
        "audio_labels": np.full((1, 2, 2, 2), 0.25, np.float32),
    }
    expected = label_loss([0.5, -1.0], [1, 0], 3.0)
    expected += -(np.log(0.6) + np.log(0.9) + np.log(0.8)) / 3
    expected += label_loss([0.25, 0.25], [0, 1], 3.0)
    arrays = jax.tree.map(jnp.asarray, batch)
    apply = lambda params, batch, method: jax.tree.map(jnp.asarray, outputs)  # noqa: E731
    found, metrics = value(losses.dense(3.0), apply, arrays)
    assert found == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(metrics["image_labels_recall"], [1.0, 1.0])
    np.testing.assert_allclose(metrics["audio_labels_precision"], [1.0, 2.0])
    np.testing.assert_allclose(metrics["box_bins_off"], [0.0, 3.0])


def test_dense_labels_by_example() -> None:
    """Both words of "red circle" right, one of three, and a patch with nothing on it."""
    found, _ = losses._labels(jnp.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]),
                              jnp.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]]), 4.0)  # fmt: skip
    total = np.log(np.exp([2.0, 1.0, 0.0, 0.0]).sum())
    np.testing.assert_allclose(found, [4 * (total - 1.5), 4 * total, total], rtol=1e-6)
