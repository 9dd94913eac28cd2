"""One jitted training step: gradients over the micro-batches, update of the trainable part, metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mm_jax.train.losses import Batch, Loss, Sums
from mm_jax.train.partition import join
from mm_jax.train.state import TrainState, Usual

SETTLED = 50  # steps whose average says what is usual
MEMORY = 0.02  # share of a new step in the averages after that

Step = Callable[[TrainState, dict[str, Any], Batch], tuple[TrainState, Sums]]


def make_step(
    apply: Callable[..., Any],
    loss: Loss,
    transform: optax.GradientTransformation,
    rates: optax.Schedule,
    accumulate: int = 1,
    shardings: TrainState | None = None,
    spike: float = 0.0,
) -> Step:
    """The step of a stage: (state, frozen params, batch) -> (state, metrics); the state is donated.

    apply: (params, batch, method=None) -> model output. Batch arrays are [B, ...], or [A, B, ...] when
    `accumulate` = A > 1. Metrics stay on the device as {name: float32 [numerator, denominator]}; summing them
    over steps and dividing gives the average of an interval. `shardings`: where the state lies, before and after, and
    with it the gradients.

    A step whose loss or gradients are not finite, or more than `spike` times (if not 0) their running average, changes
    neither parameters nor optimizer; "skipped" among the metrics is then 1.
    """

    def gradients(trainable: Any, frozen: Any, batch: Batch, totals: Sums) -> tuple[Any, Sums]:
        def objective(trainable: Any) -> tuple[jax.Array, Sums]:
            sums, metrics = loss.numerators(apply, join(trainable, frozen), batch)
            terms = [sums[name] / jnp.maximum(totals[name], 1e-6) for name in sums]
            value = sum(terms[1:], terms[0])
            return value, {**metrics, "loss": jnp.stack([value, jnp.float32(1)])}

        grads, metrics = jax.grad(objective, has_aux=True)(trainable)
        if shardings is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings.trainable)
        return grads, metrics

    def step(state: TrainState, frozen: dict[str, Any], batch: Batch) -> tuple[TrainState, Sums]:
        totals = loss.denominators(batch)
        if accumulate == 1:
            grads, metrics = gradients(state.trainable, frozen, batch, totals)
        else:

            def add(carry: Any, part: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, gradients(state.trainable, frozen, part, totals)), None

            first = jax.tree.map(lambda x: x[0], batch)
            shapes = jax.eval_shape(gradients, state.trainable, frozen, first, totals)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, metrics), _ = jax.lax.scan(add, zeros, batch)
            # Parts of the loss add up to the loss of the whole batch.
            metrics["loss"] = metrics["loss"].at[1].set(1.0)
        updates, opt_state = transform.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        one, value, norm = jnp.float32(1), metrics["loss"][0], optax.tree.norm(grads)
        good, usual = judge(state.usual, value, norm, spike)
        metrics["grad_norm"] = jnp.stack([norm, one])
        metrics["learning_rate"] = jnp.stack([jnp.asarray(rates(state.step), jnp.float32), one])
        metrics["skipped"] = jnp.stack([1 - good.astype(jnp.float32), one])
        key = jax.random.fold_in(state.key, state.step)
        before = (state.step, state.trainable, state.opt_state, state.key)
        after = (state.step + 1, trainable, opt_state, key)
        return TrainState(*jax.tree.map(lambda a, b: jnp.where(good, a, b), after, before), usual), metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def judge(usual: Usual, loss: jax.Array, grad_norm: jax.Array, spike: float) -> tuple[jax.Array, Usual]:
    """(whether an update may be done, the new averages).

    A spike moves the averages as far as it may go, so that a lasting change of level becomes usual after some steps;
    what is not finite leaves them alone.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    good, settled = finite, usual.count >= SETTLED
    rate = jnp.maximum(1 / (usual.count + 1), MEMORY)

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        if spike:
            new = jnp.where(settled, jnp.minimum(new, spike * old), new)
        return jnp.where(finite, old + rate * (new - old), old)

    if spike:
        calm = (loss <= spike * usual.loss) & (grad_norm <= spike * usual.grad_norm)
        good = finite & (calm | ~settled)
    count = usual.count + finite
    return good, Usual(average(usual.loss, loss), average(usual.grad_norm, grad_norm), count)
