"""Layers of a decoder that read the features of pictures in place of earlier tokens."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import repeat

from mm_jax.models.execution import Execution
from mm_jax.models.layers import MLP, NORMS, Activation, Attention, Norm

KeysValues = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What the tokens of B rows read.

    Attributes:
      features: [B, P, D]; None where their keys and values have been kept.
      attends: bool [B, 1, T, P], the features that a token attends to.
      changes: bool [B, T, 1], tokens to which the layers' MLPs add something.
    """

    features: jax.Array | None
    attends: jax.Array
    changes: jax.Array

    @classmethod
    def of(cls, seen: jax.Array, count: int, features: jax.Array | None) -> "Context":
        """From int [B, T, C]: what a token has to do with each of C equal shares of its row's `count` features: 0
        nothing, 1 it sees them, 2 it attends to them, but sees nothing.

        Tokens that see nothing at all attend to everything in the reference, and are spared the MLP alone.
        """
        attends = repeat(seen > 0, "b t c -> b 1 t (c each)", each=count // seen.shape[-1])
        return cls(features, attends, jnp.any(seen == 1, axis=-1, keepdims=True))


class CrossBlock(nn.Module):
    """Attention to features and an MLP, each added to its input times the tanh of a learned number that starts at zero
    (Alayrac et al. 2022, Flamingo; reference: MllamaCrossAttentionDecoderLayer)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    activation: Activation = "silu"
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, kept: KeysValues | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """[B, T, D] -> [B, T, D], and the keys and values [B, P, K, H]: those that were kept, or new ones."""
        x = self.execution.block_input(x)

        def norm(name: str) -> nn.Module:
            return NORMS[self.norm](self.norm_eps, self.dtype, name)

        def gate(name: str) -> jax.Array:
            return jnp.tanh(self.param(name, nn.initializers.zeros_init(), (1,))).astype(self.dtype)

        attend = Attention(
            self.num_heads, self.num_kv_heads, self.head_dim, use_bias=False, qk_norm=True, norm_eps=self.norm_eps,
            dtype=self.dtype, qk_norm_kind=self.norm, start="open", execution=self.execution, name="attention",
        )  # fmt: skip
        y, kept = attend(
            norm("attention_norm")(x), context=context.features, mask=context.attends, kept=kept, keep=True
        )
        anything = jnp.any(context.attends[:, 0], axis=-1, keepdims=True)
        x = x + gate("attention_gate") * jnp.where(anything, y, 0)
        mlp = MLP(self.mlp_dim, self.activation, True, False, self.dtype, start="open", name="mlp")
        y = mlp(norm("mlp_norm")(x))
        x = x + gate("mlp_gate") * jnp.where(context.changes, y, 0)
        return self.execution.constrain(x, "batch", "length", None), kept
