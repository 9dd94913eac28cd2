"""Device meshes: six axes of any sizes, given or chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mm_jax.errors import UserError, nearest
from mm_jax.parallel.chips import memory_of

AXES = ("dcn_data", "data", "fsdp", "expert", "context", "tensor")  # neighbours on the right are the closest


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; 0 for as many as fit best."""

    dcn_data: int = 0
    """Slices of a pod, or islands of GPUs, which see different rows; only gradients cross between them."""
    data: int = 0
    """See different rows; each holds all parameters."""
    fsdp: int = 0
    """See different rows; each holds a part of every parameter, and fetches a layer when it needs it."""
    expert: int = 1
    """See different rows; each holds some of the experts."""
    context: int = 1
    """Each sees a part of every row."""
    tensor: int = 0
    """Each has some of the heads and of the hidden units of every layer."""


@dataclass(frozen=True)
class Demand:
    """What `choose` looks at.

    Attributes:
      rows: of one forward pass, over all devices.
      state_bytes: of parameters, gradients and optimizer state together.
      divides_tensor: what tensor parallelism must divide, such as the number of key/value heads.
    """

    rows: int
    state_bytes: int = 0
    divides_tensor: int = 1


def choose(config: MeshConfig, devices: Sequence[Any], demand: Demand) -> dict[str, int]:
    """The size of every axis.

    Slices become dcn_data. Rows are spread as far as they go, and tensor takes what they leave over. Devices that see
    different rows hold copies (data) while the state takes less than a third of their memory, else parts (fsdp).

    Raises:
        UserError: the given sizes do not fit the number of devices, or the rows cannot be spread over what is left.
    """
    count = len(devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    for axis, size in sizes.items():
        if size < 0:
            raise UserError(f"mesh.{axis} is {size}; at least 1 is needed, or 0 for as many as fit best")
    if not sizes["dcn_data"]:
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        sizes["dcn_data"] = slices if _product(sizes) * slices <= count else 1
    left, uneven = divmod(count, _product(sizes))
    free = [axis for axis in ("data", "fsdp", "tensor") if not sizes[axis]]
    if uneven or not left or (left > 1 and not free):
        given = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"
        needed = f"{_product(sizes)} devices" + (" or a multiple" if free else "")
        raise UserError(f"mesh: {given} needs {needed}, there are {count}; 0 lets an axis take what is left")
    if "tensor" in free:
        sizes["tensor"] = left if len(free) == 1 else _tensor(left, sizes, demand)
        left //= sizes["tensor"]
    copies_fit = demand.state_bytes <= memory_of(devices[0]) * sizes["tensor"] / 3
    for axis in ("data", "fsdp") if copies_fit else ("fsdp", "data"):
        if not sizes[axis]:
            sizes[axis], left = left, 1
    return sizes


def _tensor(left: int, sizes: dict[str, int], demand: Demand) -> int:
    """The fewest devices that must share a row when `left` are to be used."""
    apart = _product({**sizes, "context": 1})
    for tensor in _divisors(left):
        if demand.rows % (apart * left // tensor) == 0:
            if demand.divides_tensor % tensor:
                break
            return tensor
    raise UserError(
        f"mesh: {demand.rows} rows cannot be spread over {apart * left} devices, and so that they share rows "
        f"{demand.divides_tensor} heads would have to be spread too; use batch.rows that are a multiple of "
        f"{apart * left}, or give the sizes of the mesh"
    )


def build_mesh(sizes: dict[str, int], devices: Sequence[Any]) -> Mesh:
    """The mesh, laid out so that the axes on the right are neighbours in the machine's network."""
    shape = tuple(sizes[axis] for axis in AXES)
    if devices[0].platform == "cpu" or len(devices) == 1:
        grid = np.array(devices).reshape(shape)
    elif sizes["dcn_data"] > 1:
        inside, across = (1, *shape[1:]), (shape[0], *[1] * (len(shape) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_mesh(
    config: MeshConfig = MeshConfig(), demand: Demand | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """`choose` and `build_mesh` over `devices`, all of them without.

    Raises:
        UserError: as `choose`.
    """
    devices = jax.devices() if devices is None else devices
    return build_mesh(choose(config, devices, demand or Demand(len(devices))), devices)


def parse_mesh(text: str) -> MeshConfig:
    """`"fsdp=64,tensor=4"`; axes that are not named are as in `MeshConfig()`.

    Raises:
        UserError: an unknown axis or no whole number.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES:
            raise UserError(f'mesh: there is no axis "{axis}"{nearest(axis, AXES)}')
        if not size.isdigit():
            raise UserError(f'mesh: "{part}" is not of the form {axis}=8')
        sizes[axis] = int(size)
    return dataclasses.replace(MeshConfig(), **sizes)


def describe(mesh: Mesh) -> str:
    """`fsdp 4 x tensor 2`, axes of size 1 left out."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def _product(sizes: dict[str, int]) -> int:
    return math.prod(max(size, 1) for size in sizes.values())


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
