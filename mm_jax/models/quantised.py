"""Kernels in few bits: integers with factors, in place of floats."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

Weights = Literal["float", "int8", "int4"]
WEIGHTS = get_args(Weights)

GROUP = 64  # inputs that share a factor of an int4 kernel
HEAD = ("head",)
BLOCK = ("query", "key", "value", "out", "gate", "up", "down")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """A kernel [..., in, out] as integers and factors, symmetric around zero.

    Attributes:
      values: int8 [..., in, out]; of 4 bits two in one uint8, [..., in / 2, out]: the first half of the inputs in the
        low bits.
      scales: float32 [..., groups, out], of so many groups of inputs that follow each other.
    """

    values: jax.Array
    scales: jax.Array
    bits: int = field(default=8, metadata={"static": True})

    def integers(self) -> jax.Array:
        """int8 [..., in, out]."""
        if self.bits == 8:
            return self.values
        halves = [self.values & 15, self.values >> 4]
        return jnp.concatenate([half.astype(jnp.int8) - 8 for half in halves], axis=-2)

    def floats(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel [..., in, out] that it stands for."""
        groups = self.scales.shape[-2]
        grouped = rearrange(self.integers(), "... (g i) o -> ... g i o", g=groups)
        return rearrange(grouped * self.scales[..., None, :], "... g i o -> ... (g i) o").astype(dtype)


@partial(jax.jit, static_argnames=("bits", "group"))
def quantise(kernel: jax.Array, bits: int, group: int = 0) -> Quantised:
    """[..., in, out] -> integers, each group of `group` inputs of each output with its own factor.

    group: 0, or one that does not divide the inputs, for all inputs together. An odd number of inputs takes 8 bits.
    """
    inputs = kernel.shape[-2]
    bits = 8 if inputs % 2 else bits
    groups = inputs // group if group and inputs % group == 0 else 1
    most = 2 ** (bits - 1) - 1
    grouped = rearrange(kernel.astype(jnp.float32), "... (g i) o -> ... g i o", g=groups)
    scales = jnp.maximum(jnp.max(jnp.abs(grouped), axis=-2) / most, 1e-30)
    values = rearrange(jnp.round(grouped / scales[..., None, :]), "... g i o -> ... (g i) o").astype(jnp.int8)
    if bits == 4:
        low, high = jnp.split((values + 8).astype(jnp.uint8), 2, axis=-2)
        values = low | (high << 4)
    return Quantised(values, scales, bits)


def quantised(params: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """A model's parameters with the decoder's large kernels as integers: those of its blocks, and a head of its own.

    int8: a factor for each output. int4: one for `GROUP` inputs of each output; the head stays int8. What is small
    (norms, biases, routers, adapters) or reads single rows (the embedding table) stays as it is, as do the encoders,
    which run once for each picture.
    """
    if weights == "float":
        return params
    bits, group = (8, 0) if weights == "int8" else (4, GROUP)

    def convert(tree: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in tree.items():
            if name in BLOCK and not isinstance(value, dict):  # experts have no module for each map
                found[name] = quantise(value, bits, group)
            elif name in (*BLOCK, *HEAD) and "kernel" in value:
                how = (8, 0) if name in HEAD else (bits, group)
                found[name] = value | {"kernel": quantise(value["kernel"], *how)}
            else:
                found[name] = convert(value) if isinstance(value, dict) else value
        return found

    return params | {"decoder": convert(params["decoder"])}


def stored(module: nn.Module, name: str) -> Quantised | None:
    """A module's parameter, where it is quantised."""
    value = module.get_variable("params", name) if module.has_variable("params", name) else None
    return value if isinstance(value, Quantised) else None


class Dense(nn.Dense):
    """A linear map whose kernel may be `Quantised`: factors of whole outputs then go on the result."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out]."""
        kernel = stored(self, "kernel")
        if kernel is None:
            return super().__call__(x)
        dtype = self.dtype or x.dtype
        x = x.astype(dtype)
        if kernel.scales.shape[-2] == 1:
            out = x @ kernel.integers().astype(dtype) * kernel.scales[0].astype(dtype)
        else:
            out = x @ kernel.floats(dtype)
        return out + self.get_variable("params", "bias").astype(dtype) if self.use_bias else out
