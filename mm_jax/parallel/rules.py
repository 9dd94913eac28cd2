"""Where arrays lie on a mesh: logical axes of every parameter, and the mesh axes that split each logical axis."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mm_jax.errors import UserError, nearest
from mm_jax.parallel.mesh import AXES

ROWS = ("dcn_data", "data", "fsdp", "expert")
Names = Sequence[str | None]


@dataclass(frozen=True)
class Rules:
    """Logical axis -> the mesh axes that split it, outermost first; () for a copy on every device.

    The encoders and projectors have axes of their own: they are small beside the decoder, and so by default every
    device runs them whole on its pictures.
    """

    batch: tuple[str, ...] = ROWS
    """Rows."""
    pictures: tuple[str, ...] = (*ROWS, "context", "tensor")
    """Pictures and clips inside the encoders."""
    length: tuple[str, ...] = ("context",)
    """Tokens of a row."""
    embed: tuple[str, ...] = ("fsdp", "context")
    """Width of the residual stream, in parameters; activations are never split there."""
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    """Hidden units."""
    vocab: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ("expert",)
    tower_embed: tuple[str, ...] = ("fsdp", "context")
    """The same of encoders and projectors, in parameters."""
    tower_heads: tuple[str, ...] = ()
    tower_mlp: tuple[str, ...] = ()

    def axes(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """All pairs, as `mm_jax.models.Execution` takes them."""
        return tuple((field.name, tuple(getattr(self, field.name))) for field in dataclasses.fields(self))

    def check(self) -> None:
        """Raises UserError where a rule names a mesh axis that does not exist."""
        for name, split in self.axes():
            for axis in split:
                if axis not in AXES:
                    raise UserError(f'rules.{name} names the mesh axis "{axis}"{nearest(axis, AXES)}')


# (regular expression on the end of a path, logical axes of the last dimensions): the first that is found counts.
# Dimensions in front of them, such as that of stacked layers, are not split; nor is a parameter without a line of
# less than a million values. Outside the decoder embed, heads and mlp mean tower_embed, tower_heads and tower_mlp.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"decoder/embedding/embedding", ("vocab", "embed")),
    (r"decoder/head/kernel", ("embed", "vocab")),
    (r"decoder/(layers/(attention|mlp)_norm|norm)/scale", ("embed",)),
    (r"mlp/(up|gate)", ("experts", "embed", "mlp")),
    (r"mlp/down", ("experts", "mlp", "embed")),
    (r"router/kernel", ("embed", None)),
    (r"(query|gate_query)/kernel", ("embed", "heads")),
    (r"(key|value)/kernel", ("embed", "kv_heads")),
    (r"(attention|delta)/out/kernel", ("heads", "embed")),
    (r"(query|key|value)_conv", (None, "kv_heads")),
    (r"query/bias", ("heads",)),
    (r"(key|value)/bias", ("kv_heads",)),
    (r"(up|gate)/kernel", ("embed", "mlp")),
    (r"(up|gate)/bias", ("mlp",)),
    (r"down/kernel", ("mlp", "embed")),
    (r"\w*projector/hidden/kernel", ("embed", "mlp")),
    (r"\w*projector/hidden/bias", ("mlp",)),
    (r"\w*projector/out/kernel", ("mlp", "embed")),
    (r"\w*projector/input/kernel", ("embed", None)),
    (r"patch_embed/kernel", (None, "embed")),
    (r"positions", (None, "embed")),
    (r"conv\d*/kernel", (None, "embed")),
    (r"heads/[^/]+/kernel", ("embed", None)),
)
LARGE = 2**20  # values

TOWER = {"embed": "tower_embed", "heads": "tower_heads", "kv_heads": "tower_heads", "mlp": "tower_mlp"}

# batch array -> logical axes of its first dimensions; arrays that are not listed are split by rows
BATCH = {
    name: ("batch", "length")
    for name in ("tokens", "segment_ids", "positions", "media_index", "loss_weights", "sources", "names")
}


def logical_axes(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Names of the dimensions of a parameter.

    >>> logical_axes("decoder/layers/mlp/up/kernel", (32, 4096, 11008))
    (None, 'embed', 'mlp')
    """
    found = next((names for pattern, names in PARAMETERS if re.search(f"(^|/){pattern}$", path)), None)
    if found is None or len(found) > len(shape):
        found = _by_size(shape)
    if not path.startswith("decoder/"):
        found = tuple(TOWER.get(name, name) for name in found)
    return (None,) * (len(shape) - len(found)) + tuple(found)


def _by_size(shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """A large parameter that no line describes is split along its longer side of the last two."""
    if len(shape) < 2 or math.prod(shape) < LARGE:
        return ()
    return ("embed", None) if shape[-2] > shape[-1] else (None, "embed")


def spec_of(what: str, shape: tuple[int, ...], names: Names, mesh: Mesh, rules: Rules) -> PartitionSpec:
    """The mesh axes of each dimension of one array.

    Raises:
        UserError: a mesh axis would be used twice, or does not divide the dimension; `what` and a way out are named.
    """
    axes, used, spec = dict(rules.axes()), {}, []
    for size, name in zip(shape, names, strict=True):
        split = tuple(axis for axis in axes.get(name, ()) if mesh.shape[axis] > 1)
        for axis in split:
            if axis in used:
                raise UserError(
                    f"{what} {list(shape)}: {used[axis]} and {name} are both split over mesh axis {axis}; "
                    f"take it out of rules.{used[axis]} or rules.{name}"
                )
            used[axis] = name
        parts = math.prod(mesh.shape[axis] for axis in split)
        if size % parts:
            over = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in split)
            raise UserError(
                f"{what} {list(shape)}: {name} {size} cannot be split over {over}; choose a mesh whose "
                f"{' x '.join(split)} divides {size}, or leave {name} whole with an empty rules.{name}"
            )
        spec.append(split or None)
    return PartitionSpec(*spec)


def place(mesh: Mesh, rules: Rules = Rules()) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """(path, shape) of a parameter -> where it lies. The function raises UserError as `spec_of` does."""
    rules.check()

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, spec_of(path, shape, logical_axes(path, shape), mesh, rules))

    return sharding


def place_tree(tree: Any, params: Any, mesh: Mesh, rules: Rules = Rules()) -> Any:
    """The sharding of every leaf of `tree`: of parameters, their gradients or an optimizer's state.

    A leaf whose path ends with that of a parameter, and which has its shape, lies as that parameter; all others, such
    as step counts and factored moments, are copies on every device.

    Args:
      tree, params: arrays or their shapes.
    """
    sharding = place(mesh, rules)
    shapes = {_path(key): leaf.shape for key, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def one(key: Any, leaf: Any) -> NamedSharding:
        parts = _path(key).split("/")
        for start in range(len(parts)):
            path = "/".join(parts[start:])
            if shapes.get(path) == leaf.shape:
                return sharding(path, leaf.shape)
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def _path(key: Any) -> str:
    return jax.tree_util.keystr(key, simple=True, separator="/")


def batch_shardings(
    shapes: dict[str, tuple[int, ...]], mesh: Mesh, rules: Rules = Rules(), accumulate: int = 1
) -> dict[str, NamedSharding]:
    """Where batch arrays [B, ...] (or [A, B, ...] when accumulating) lie.

    Raises:
        UserError: rows or tokens cannot be spread evenly.
    """
    first = () if accumulate == 1 else (None,)
    found = {}
    for name, shape in shapes.items():
        names = (*first, *BATCH.get(name, ("batch",)))
        names += (None,) * (len(shape) - len(names))
        found[name] = NamedSharding(mesh, spec_of(f"batch array {name}", shape, names, mesh, rules))
    return found


def rows_of_process(mesh: Mesh, rules: Rules, rows: int) -> tuple[int, int]:
    """(index, count) of this process among those that hold different rows, of `rows` in all.

    Processes that share rows, such as those of one tensor-parallel group, have the same index: they must read the same.

    Raises:
        UserError: rows cannot be spread evenly, or two processes share only some of theirs.
    """
    sharding = batch_shardings({"tokens": (rows, 1)}, mesh, dataclasses.replace(rules, length=()))["tokens"]
    held: dict[int, set[int]] = {}
    for device, (part, _) in sharding.devices_indices_map((rows, 1)).items():
        held.setdefault(device.process_index, set()).update(range(*part.indices(rows)))
    groups = sorted({tuple(sorted(mine)) for mine in held.values()})
    if sum(map(len, groups)) != rows or len({len(group) for group in groups}) > 1:
        raise UserError(
            f"mesh {dict(mesh.shape)}: some processes share a part of their rows; choose a mesh whose context x tensor "
            "divides the devices of a process, or is a multiple of them"
        )
    return groups.index(tuple(sorted(held[jax.process_index()]))), len(groups)


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, rules: Rules = Rules(), accumulate: int = 1, count: int = 1
) -> dict[str, jax.Array]:
    """Batch arrays on the devices.

    Args:
      count: how many processes bring different rows, see `rows_of_process`; `batch` are those of this one.
    """
    axis = 0 if accumulate == 1 else 1
    shapes = {}
    for name, array in batch.items():
        shape = list(array.shape)
        shape[axis] *= count
        shapes[name] = tuple(shape)
    shardings = batch_shardings(shapes, mesh, rules, accumulate)
    if jax.process_count() == 1:
        return jax.device_put(batch, shardings)
    return {
        name: jax.make_array_from_process_local_data(shardings[name], array, shapes[name])
        for name, array in batch.items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
