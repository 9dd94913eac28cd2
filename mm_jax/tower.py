"""An encoder on its own, from a checkpoint that holds nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mm_jax.checkpoint.hf import HFCheckpoint
from mm_jax.data.media_rule import channels_last
from mm_jax.errors import UserError
from mm_jax.models import ENCODERS


class Tower:
    """A vision encoder.

    Attributes:
      family: the model_type of its checkpoint.
      config: sizes and options.
      params: plain nested dict of arrays.
    """

    def __init__(self, checkpoint: HFCheckpoint, params: Any):
        self.checkpoint, self.params = checkpoint, params
        self.family, self.config = checkpoint.family.name, checkpoint.system.config
        self.model = ENCODERS[type(self.config)](self.config, jnp.dtype(checkpoint.dtype))

    def batch(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """pixel_values [n, 3, H, W] -> the batch that `apply` takes."""
        if set(arrays) != {"pixel_values"}:
            raise UserError(f"a vision tower takes pixel_values alone, not {', '.join(arrays) or 'nothing'}")
        pixels = channels_last(np.asarray(arrays["pixel_values"]), self.config.inputs["pixel_values"])
        return {"pixel_values": pixels}

    def apply(self, params: Any, batch: dict) -> jax.Array:
        """Features [n, tokens, channels], the reference's `last_hidden_state`, maps row by row. Pure and jittable."""
        return self.model.apply({"params": params}, batch["pixel_values"])
