"""What a training step carries from one step to the next."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Usual:
    """Running averages by which a step knows a spike: of the loss and of the gradients' norm, over `count` steps."""

    loss: jax.Array = field(default_factory=lambda: jnp.float32(0))
    grad_norm: jax.Array = field(default_factory=lambda: jnp.float32(0))
    count: jax.Array = field(default_factory=lambda: jnp.int32(0))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The moving part of a run; the frozen parameters travel beside it and are never an output.

    step: int32 scalar, updates done in this stage; a step that is skipped is none. trainable: nested dict of the moved
    params. opt_state: optax state of `trainable` and nothing else. key: typed PRNG key of the stage.
    """

    step: jax.Array
    trainable: dict[str, Any]
    opt_state: Any
    key: jax.Array
    usual: Usual = field(default_factory=Usual)
