"""What a training step carries from one step to the next."""

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The moving part of a run; the frozen parameters travel beside it and are never an output.

    step: int32 scalar, updates done in this stage. trainable: nested dict of the moved params.
    opt_state: optax state of `trainable` and nothing else. key: typed PRNG key of the stage.
    """

    step: jax.Array
    trainable: dict[str, Any]
    opt_state: Any
    key: jax.Array
