"""Mixture of experts: every token goes through a few of many MLPs."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mm_jax.models.layers import ACTIVATIONS, CLOSED, OPEN, Activation
from mm_jax.models.quantised import stored


@dataclass(frozen=True)
class ExpertConfig:
    """Sizes of a mixture.

    Attributes:
      num_experts, num_chosen: how many there are, and how many a token goes through.
      mlp_dim: hidden width of one.
      normalise: the weights of the chosen ones add up to 1.
    """

    num_experts: int
    num_chosen: int
    mlp_dim: int
    normalise: bool = True


class Experts(nn.Module):
    """Gated MLPs behind a softmax router (Shazeer et al. 2017; Qwen3-MoE).

    No token is dropped, so a token's output depends on nothing else in the batch: the tokens are sorted by expert, and
    each expert multiplies its own run of them. Shapes do not depend on who chose whom.
    """

    config: ExpertConfig
    activation: Activation = "silu"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        tokens = rearrange(x, "b t d -> (b t) d")
        router = nn.Dense(c.num_experts, use_bias=False, dtype=self.dtype, name="router")(tokens)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(router.astype(jnp.float32)), c.num_chosen)
        if c.normalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        chosen = rearrange(chosen, "t k -> (t k)")
        order = jnp.argsort(chosen, stable=True)
        sizes = jnp.bincount(chosen, length=c.num_experts)

        def project(
            name: str, inputs: jax.Array, features: int, init: nn.initializers.Initializer
        ) -> jax.Array:
            shape = (c.num_experts, inputs.shape[-1], features)
            kernel = stored(self, name)
            kernel = self.param(name, init, shape) if kernel is None else kernel.floats(self.dtype)
            kernel = kernel.astype(self.dtype)
            return jax.lax.ragged_dot(inputs, kernel, sizes)

        sorted_tokens = jnp.take(tokens, order // c.num_chosen, axis=0).astype(self.dtype)
        hidden = ACTIVATIONS[self.activation](project("gate", sorted_tokens, c.mlp_dim, OPEN))
        hidden = hidden * project("up", sorted_tokens, c.mlp_dim, OPEN)
        out = project("down", hidden, x.shape[-1], CLOSED)
        out = out[jnp.argsort(order)] * rearrange(weights, "t k -> (t k) 1").astype(self.dtype)
        out = jnp.sum(rearrange(out, "(t k) d -> t k d", k=c.num_chosen), axis=1)
        return out.reshape(x.shape)
