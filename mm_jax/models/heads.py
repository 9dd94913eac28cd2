"""Heads that train an encoder on dense targets before any language model looks at it."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange


@dataclass(frozen=True)
class HeadConfig:
    """num_labels label words; box_bins places along each side of the picture."""

    num_labels: int = 0
    box_bins: int = 64


class DenseHeads(nn.Module):
    """For every image patch and audio position: which label words cover it, and where that object's box is.

    The boxes are four classifications over bins of the picture's sides, x0 y0 x1 y1: absolute places, so that the
    features of a patch come to say where its object is (dense prediction as in Tian et al. 2019, FCOS, with the bins of
    Chen et al. 2022, Pix2seq).
    """

    config: HeadConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.image_labels = nn.Dense(self.config.num_labels, dtype=self.dtype)
        self.image_boxes = nn.Dense(4 * self.config.box_bins, dtype=self.dtype)
        self.audio_labels = nn.Dense(self.config.num_labels, dtype=self.dtype)

    def image(self, features: jax.Array) -> dict[str, jax.Array]:
        """[..., C] -> float32 image_labels [..., L] and image_boxes [..., 4, bins], both logits."""
        boxes = rearrange(self.image_boxes(features), "... (side bin) -> ... side bin", side=4)
        return {
            "image_labels": self.image_labels(features).astype(jnp.float32),
            "image_boxes": boxes.astype(jnp.float32),
        }

    def audio(self, features: jax.Array) -> dict[str, jax.Array]:
        """[..., C] -> float32 audio_labels [..., L], logits."""
        return {"audio_labels": self.audio_labels(features).astype(jnp.float32)}
