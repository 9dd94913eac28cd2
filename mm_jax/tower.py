"""An encoder on its own, from a checkpoint that holds nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mm_jax.checkpoint.hf import HFCheckpoint
from mm_jax.data.media_rule import channels_last
from mm_jax.errors import UserError
from mm_jax.models import dummy_inputs, encoder


class Tower:
    """An encoder of pictures or sound.

    Attributes:
      family: the model_type of its checkpoint.
      config: sizes and options.
      params: plain nested dict of arrays.
    """

    def __init__(self, checkpoint: HFCheckpoint, params: Any):
        self.checkpoint, self.params = checkpoint, params
        self.family, self.config = checkpoint.family.name, checkpoint.system.config
        self.model = encoder(self.config, jnp.dtype(checkpoint.dtype))

    def batch(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays that the reference's processor gives -> the batch that `apply` takes.

        Raises UserError for other arrays than the reference takes, and for wrong shapes.
        """
        system = self.checkpoint.system
        needed, *others = system.takes
        if needed not in arrays or not set(arrays) <= set(system.takes):
            what = f"{needed} alone" if not others else f"{needed} and, where needed, {', '.join(others)}"
            raise UserError(f"{self.family} takes {what}, not {', '.join(arrays) or 'nothing'}")
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        if system.inputs is not None:
            return system.inputs(self.config, arrays)
        return {"pixel_values": channels_last(arrays["pixel_values"], self.config.inputs["pixel_values"])}

    def apply(self, params: Any, batch: dict) -> jax.Array:
        """Features [n, tokens, channels], the reference's `last_hidden_state`, maps row by row. Pure and jittable."""
        found = self.model.apply({"params": params}, *(batch[name] for name in dummy_inputs(self.config)))
        return found[0] if isinstance(found, tuple) else found  # without the states for a decoder's layers
