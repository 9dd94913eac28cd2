"""How a model's program runs on its devices: placement of activations, recomputation, attention kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Remat = Literal["none", "dots", "minimal", "full", "offload"]
Kernel = Literal["auto", "xla", "cudnn", "splash"]
Exchange = Literal["ring", "heads", "gather"]

RESIDUAL = "residual"  # checkpoint name of what enters a block
ATTENTION = "attention"  # checkpoint name of what an attention kernel gives out


@dataclass(frozen=True)
class Execution:
    """Handed to a module by whoever runs it. It changes where and when things are computed, never what.

    Attributes:
      mesh: the devices; None leaves everything to the compiler.
      axes: (logical axis, mesh axes) pairs: how activations lie on the mesh. Logical axes that activations have:
        batch, pictures, length, heads, kv_heads, tower_heads, vocab.
      remat: what the backward pass keeps of each layer. "none" keeps everything; "dots" the results of all matrix
        products; "minimal" those with parameters, so that only cheap operations run twice; "full" the input of each
        layer alone; "offload" like full, with the inputs in the memory of the host.
      attention: the kernel; "auto" takes cuDNN on NVIDIA GPUs and splash attention on TPUs where they can be used.
      context: how queries meet the keys of a row that lies in parts on several devices. "ring": keys go round, see
        `mm_jax.models.ring`; "heads": before attention parts of rows become parts of the heads, and afterwards rows
        again (Jacobs et al. 2023, DeepSpeed-Ulysses); "gather": every device fetches all keys, as it also does where
        the other two cannot be used.
    """

    mesh: Mesh | None = None
    axes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    remat: Remat = "none"
    attention: Kernel = "auto"
    context: Exchange = "ring"

    @property
    def platform(self) -> str:
        """What the program is compiled for: "cpu", "gpu" or "tpu"."""
        return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

    def spec(self, shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
        """Mesh axes of each dimension, each axis once; those at the end that do not divide a size are left out."""
        axes, spec, used = dict(self.axes), [], set()
        for size, name in zip(shape, names, strict=True):
            split = tuple(a for a in axes.get(name, ()) if self.mesh.shape[a] > 1 and a not in used)
            while split and size % math.prod(self.mesh.shape[axis] for axis in split):
                split = split[:-1]
            used |= set(split)
            spec.append(split or None)
        return PartitionSpec(*spec)

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x`, told to lie on the mesh as its logical axes say."""
        if self.mesh is None or self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(x.shape, *names)))

    def with_heads_apart(
        self, names: tuple[str, str | None, str, str], query: tuple[int, ...], key: tuple[int, ...]
    ) -> Execution:
        """With heads [B, T, N, H] and [B, S, K, H] split by what splits their rows' length, where it divides both.

        names: logical axes of B, T, N and K.
        """
        rows, length, heads, kv_heads = names
        axes = dict(self.axes)
        if self.mesh is None or not self.spec(query, rows, length, heads, None)[1]:
            return self
        apart = {name: (*axes.get(name, ()), *axes[length]) for name in (heads, kv_heads)}
        other = replace(self, axes=tuple((axes | apart | {length: ()}).items()))
        parts = math.prod(self.mesh.shape[axis] for axis in apart[heads])
        fits = query[2] % parts == key[2] % parts == 0 and apart[heads] == apart[kv_heads]
        return other if fits else self

    def block_input(self, x: jax.Array) -> jax.Array:
        """[B, T, D], what enters a block of a stack: named, so that remat policies can keep it elsewhere."""
        return checkpoint_name(x, RESIDUAL) if self.remat == "offload" else x

    def rematerialised(self, block: type[nn.Module]) -> type[nn.Module]:
        """`block`, recomputed in the backward pass as `remat` says."""
        if self.remat == "none":
            return block
        return nn.remat(block, prevent_cse=False, policy=_policy(self.remat))


def axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension of a PartitionSpec, which writes a single one without brackets."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def _policy(remat: Remat) -> Callable[..., Any]:
    policies = jax.checkpoint_policies
    kernel = policies.save_only_these_names(ATTENTION)
    if remat == "dots":
        return policies.save_from_both_policies(policies.dots_saveable, kernel)
    if remat == "minimal":
        return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, kernel)
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[RESIDUAL],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    return policies.nothing_saveable
