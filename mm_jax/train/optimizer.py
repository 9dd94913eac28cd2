"""AdamW, Muon or Adafactor: warm-up, cosine decay, clipping, a weight-decay mask; sees the trainable part alone."""

from typing import Any

import jax
import optax
import optax.contrib
from flax.traverse_util import flatten_dict, unflatten_dict

from mm_jax.train.config import OptimizerConfig

ENDS = ("patch_embed", "conv1", "conv2", "heads", "head")
NO_DECAY = ("norm", "bias", "scale", "embedding", "position", "queries", "log_rate")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, which is held until the last `decay_fraction` of the steps; from there a
    cosine down to `final_fraction` of it at `steps`."""
    warmup = min(config.warmup_steps, steps)
    fall = min(round(config.decay_fraction * steps), steps - warmup)
    # The first step already moves: warm-up counts from 1/warmup, not from zero.
    rise = optax.linear_schedule(
        config.learning_rate / max(warmup, 1), config.learning_rate, max(warmup - 1, 1)
    )
    hold = optax.constant_schedule(config.learning_rate)
    cosine = optax.cosine_decay_schedule(config.learning_rate, max(fall, 1), alpha=config.final_fraction)
    return optax.join_schedules([rise, hold, cosine], [warmup, steps - fall])


def decay_mask(params: dict[str, Any]) -> dict[str, Any]:
    """True where weight decay applies: matrices, but no norm, bias, embedding or learned position."""
    flat = flatten_dict(params, sep="/")
    decays = {
        path: x.ndim > 1 and not any(word in part for part in path.lower().split("/") for word in NO_DECAY)
        for path, x in flat.items()
    }
    return unflatten_dict(decays, sep="/")


def hidden_matrices(params: dict[str, Any]) -> dict[str, Any]:
    """Which axes of a parameter are a matrix for Muon, None where AdamW applies.

    Kernels [in, out] and stacks of them [layers, in, out], but not those at either end of the model: patches and
    frames come in, logits go out.
    """

    def axes(path: str, x: jax.Array | optax.MaskedNode) -> optax.contrib.MuonDimensionNumbers | None:
        at_an_end = any(part in ENDS for part in path.split("/"))
        if at_an_end or not path.endswith("kernel") or isinstance(x, optax.MaskedNode) or x.ndim > 3:
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1)

    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: axes(path, x) for path, x in flat.items()}, sep="/")


def optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The transformation of one stage; `init` takes the trainable params only."""
    rates = schedule(config, steps)
    if config.kind == "muon":
        update = optax.contrib.muon(
            rates,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            mu_dtype=config.moment_dtype,
            muon_weight_dimension_numbers=hidden_matrices,
            consistent_rms=0.2,  # steps as large as AdamW's, so one learning rate serves both
        )
    elif config.kind == "adafactor":
        update = optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.8),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay, decay_mask),
            optax.scale_by_learning_rate(rates),
        )
    else:
        update = optax.adamw(
            rates,
            b1=config.beta1,
            b2=config.beta2,
            mu_dtype=config.moment_dtype,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
