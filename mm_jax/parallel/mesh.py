"""Data parallelism over the local devices: rows of a batch are spread, parameters are copied."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mm_jax.errors import UserError


def data_mesh(rows: int | None = None) -> Mesh:
    """A mesh with one axis, `data`, over all local devices.

    Raises:
        UserError: `rows` (of a batch) cannot be spread evenly over the devices.
    """
    devices = jax.local_devices()
    if rows is not None and rows % len(devices):
        raise UserError(f"batch.rows is {rows}, a multiple of the {len(devices)} devices is needed")
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of params and optimizer state: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, accumulate: int = 1) -> dict[str, Any]:
    """Batch arrays [B, ...] (or [A, B, ...] when accumulating) on the devices, rows spread over `data`."""
    spec = PartitionSpec("data") if accumulate == 1 else PartitionSpec(None, "data")
    return jax.device_put(batch, NamedSharding(mesh, spec))
