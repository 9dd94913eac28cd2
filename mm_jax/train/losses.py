"""The three losses of a stage: dense targets for encoders, next token, preference (DPO).

Every loss is a sum of *terms*; a term is a numerator that depends on the parameters and a denominator that
depends on the batch alone. Denominators are taken over all micro-batches before the first backward pass, so
accumulated gradients equal those of one big batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]
Apply = Callable[..., Any]
"""(params, batch, method=None) -> model output."""


@dataclass(frozen=True)
class Loss:
    """loss = sum over terms of numerators[term] / denominators[term].

    denominators(batch) -> {term: scalar}; works with and without a leading [A].
    numerators(apply, params, batch) -> ({term: scalar}, metrics {name: [numerator, denominator]}).
    """

    denominators: Callable[[Batch], Sums]
    numerators: Callable[[Apply, Any, Batch], tuple[Sums, Sums]]


def next_token_weights(batch: Batch) -> jax.Array:
    """Weights [..., S-1] of predicting tokens[1:] from the position before, within a segment."""
    segments = batch["segment_ids"]
    same = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
    return batch["loss_weights"][..., 1:] * same


def token_log_probs(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of tokens[:, t] by logits[:, t-1], and whether it is the likeliest: both [B, S-1]."""
    scores = token_scores(logits[:, :-1], tokens[:, 1:])
    return scores["log_probs"], scores["right"]


def token_scores(logits: jax.Array, targets: jax.Array, names: jax.Array | None = None) -> Sums:
    """How logits [B, T, V] score their targets int32 [B, T]; every result is [B, T].

    log_probs: of the target. right: it is the likeliest. names: mean log-probability of the token ids names[b, t, :],
    -1 for none, 0 where there are none.
    """
    logits = logits.astype(jnp.float32)
    top = jax.lax.stop_gradient(logits.max(-1))
    total = top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))
    # a comparison, not a gather: it is fused with its neighbours, and its gradient needs no array of logits
    here = jnp.arange(logits.shape[-1]) == targets[..., None]
    gold = jnp.where(here, logits, 0).sum(-1)
    found = {"log_probs": gold - total, "right": gold >= top}
    if names is not None:
        used = names >= 0
        picked = jnp.take_along_axis(logits, jnp.maximum(names, 0), axis=-1) - total[..., None]
        share = used / jnp.maximum(used.sum(-1, keepdims=True), 1)
        found["names"] = (share * picked).sum(-1)
    return found


def chunked_scores(
    apply: Apply, params: Any, batch: Batch, targets: jax.Array, names: jax.Array | None, chunk: int
) -> Sums:
    """`token_scores` without ever holding more logits than those of `chunk` tokens a row, in either pass.

    The backward pass computes them again. A chunk takes every (S / chunk)-th token, so that where a mesh splits the
    rows' length each device has its share of every chunk.
    """
    steps = targets.shape[1] // chunk
    hidden = apply(params, batch, method="hidden")
    arrays = {"x": hidden, "targets": targets} | ({} if names is None else {"names": names})
    parts = jax.tree.map(lambda x: rearrange(x, "b (k n) ... -> n b k ...", n=steps), arrays)

    @jax.checkpoint
    def scores(part: Sums) -> Sums:
        logits = apply(params, part["x"], method="logits")
        return token_scores(logits, part["targets"], part.get("names"))

    _, found = jax.lax.scan(lambda carry, part: (carry, scores(part)), None, parts)
    return jax.tree.map(lambda x: rearrange(x, "n b k -> b (k n)"), found)


def next_token(sources: tuple[str, ...], naming: float = 0.0, chunk: int = 0) -> Loss:
    """Cross-entropy of the answer tokens, weighted by `loss_weights` and normalised by their sum.

    `sources` are the names behind batch["sources"], for the per-source losses among the metrics. With `naming`
    above 0 a second term asks the logits at each media token for batch["names"], several with equal shares. `chunk`:
    tokens of a row whose logits exist at one time, 0 for all.
    """

    def denominators(batch: Batch) -> Sums:
        sums = {"loss": next_token_weights(batch).sum()}
        return sums | {"names": (batch["names"][..., 0] >= 0).sum() / naming} if naming else sums

    def numerators(apply: Apply, params: Any, batch: Batch) -> tuple[Sums, Sums]:
        # position t predicts token t + 1; the last one predicts nothing
        weights, targets, source = (
            jnp.pad(x, ((0, 0), (0, 1)))
            for x in (next_token_weights(batch), batch["tokens"][:, 1:], batch["sources"][:, 1:])
        )
        names = batch["names"] if naming else None
        if chunk and chunk < targets.shape[1]:
            scores = chunked_scores(apply, params, batch, targets, names, chunk)
        else:
            scores = token_scores(apply(params, batch), targets, names)
        losses = -scores["log_probs"] * weights
        metrics = {"token_accuracy": jnp.stack([(scores["right"] * weights).sum(), weights.sum()])}
        for index, name in enumerate(sources):
            mine = source == index
            metrics[f"loss/{name}"] = jnp.stack([(losses * mine).sum(), (weights * mine).sum()])
        sums = {"loss": losses.sum()}
        if naming:
            sums["names"] = -scores["names"].sum()
            metrics["loss/names"] = jnp.stack([sums["names"], (names[..., 0] >= 0).sum()])
        return sums, metrics

    return Loss(denominators, numerators)


def dense(positive_weight: float) -> Loss:
    """Per-position targets for the encoders: labels of patches and audio frames, boxes of patches.

    Labels: cross-entropy over the label words and "nothing" (a logit of 0), averaged over the positions in use.
    Where several words are right ("red circle") each gets an equal share; a position with a label weighs
    `positive_weight`, one without 1. Boxes: cross-entropy over bins, averaged over coordinates that have a target
    (>= 0). Positions in use: all those of an image slot in use; those that audio frames reach.
    """

    def masks(batch: Batch) -> Sums:
        result = {}
        if "image_labels" in batch:
            labels = batch["image_labels"]
            used = (batch["image_segment_ids"] > 0)[..., None]
            result["image_labels"] = jnp.broadcast_to(used, labels.shape[:-1]).astype(jnp.float32)
            known = used[..., None] & (batch["image_boxes"] >= 0)
            result["image_boxes"] = known.astype(jnp.float32)
        if "audio_labels" in batch:
            positions, frames = batch["audio_labels"].shape[-2], batch["audio_values"].shape[-2]
            # Position t covers the frames [t * F/T, (t+1) * F/T): in use when its first frame is.
            first = jnp.arange(positions) * frames
            used = first < batch["audio_frames"][..., None] * positions
            result["audio_labels"] = used.astype(jnp.float32)
        return result

    def denominators(batch: Batch) -> Sums:
        return {name: mask.sum() for name, mask in masks(batch).items()}

    def numerators(apply: Apply, params: Any, batch: Batch) -> tuple[Sums, Sums]:
        outputs = apply(params, batch, method="dense")
        sums, metrics = {}, {}
        for name, mask in masks(batch).items():
            logits = outputs[name].astype(jnp.float32)
            if name == "image_boxes":
                log_probs = jax.nn.log_softmax(logits)
                target = jnp.maximum(batch[name], 0)
                losses = -jnp.take_along_axis(log_probs, target[..., None], axis=-1)[..., 0]
                error = jnp.abs(logits.argmax(-1) - target)
                metrics["box_bins_off"] = jnp.stack([(error * mask).sum(), mask.sum()])
            else:
                losses, found = _labels(logits, batch[name], positive_weight)
                for key, (numerator, denominator) in found.items():
                    pair = [(numerator * mask).sum(), (denominator * mask).sum()]
                    metrics[f"{name}_{key}"] = jnp.stack(pair)
            sums[name] = (losses * mask).sum()
            metrics[f"loss/{name}"] = jnp.stack([sums[name], mask.sum()])
        return sums, metrics

    return Loss(denominators, numerators)


def preference(beta: float) -> Loss:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7) over the pairs of packed rows.

    Pair g of a row: segment 2g+1 is the chosen answer, 2g+2 the rejected one. batch["reference"] float32
    [B, G, 2] holds the summed answer log-probs (chosen, rejected) under the model before the stage.
    """

    def denominators(batch: Batch) -> Sums:
        return {"loss": (batch["preference"] >= 0).sum().astype(jnp.float32)}

    def numerators(apply: Apply, params: Any, batch: Batch) -> tuple[Sums, Sums]:
        used = (batch["preference"] >= 0).astype(jnp.float32)
        gains = answer_log_probs(apply(params, batch), batch) - batch["reference"]
        margins = beta * (gains[..., 0] - gains[..., 1])
        losses = -jax.nn.log_sigmoid(margins) * used
        count = used.sum()
        metrics = {
            "reward_accuracy": jnp.stack([((margins > 0) * used).sum(), count]),
            "reward_margin": jnp.stack([(margins * used).sum(), count]),
            "reward_chosen": jnp.stack([(beta * gains[..., 0] * used).sum(), count]),
            "reward_rejected": jnp.stack([(beta * gains[..., 1] * used).sum(), count]),
        }
        return {"loss": losses.sum()}, metrics

    return Loss(denominators, numerators)


def answer_log_probs(logits: jax.Array, batch: Batch) -> jax.Array:
    """Summed log-probs of the answer tokens of every pair: [B, G, 2] (chosen, rejected)."""
    pairs = batch["preference"].shape[-1]
    log_probs, _ = token_log_probs(logits, batch["tokens"])
    answer = log_probs * (next_token_weights(batch) > 0)
    segments = 1 + jnp.arange(2 * pairs)
    mine = batch["segment_ids"][:, 1:, None] == segments
    # where, not a product: log-probs of other segments may be -inf.
    sums = jnp.where(mine, answer[..., None], 0.0).sum(1)
    return sums.reshape(sums.shape[0], pairs, 2)


def _labels(
    logits: jax.Array, labels: jax.Array, positive_weight: float
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    labels = labels.astype(jnp.float32)
    count = labels.sum(-1, keepdims=True)
    targets = jnp.concatenate([labels / jnp.maximum(count, 1), count == 0], axis=-1)
    nothing = jnp.zeros_like(logits[..., :1])
    log_probs = jax.nn.log_softmax(jnp.concatenate([logits, nothing], axis=-1))
    losses = -(targets * log_probs).sum(-1) * jnp.where(count[..., 0] > 0, positive_weight, 1.0)
    said = (logits > 0).astype(jnp.float32)
    both = (said * labels).sum(-1)
    found = {"recall": (both, labels.sum(-1)), "precision": (both, said.sum(-1))}
    return losses, found
