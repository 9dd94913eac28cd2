"""What accelerators have: memory and peak speed, from the makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chip:
    """memory: bytes. flops: dense bfloat16 FLOP/s. Both of one device."""

    memory: float
    flops: float


GIB = 2**30
# by the beginning of `device_kind`; the longer name first where one begins another
CHIPS = {
    "TPU v4": Chip(32 * GIB, 275e12),
    "TPU v5 lite": Chip(16 * GIB, 197e12),
    "TPU v5p": Chip(95 * GIB, 459e12),
    "TPU v5": Chip(95 * GIB, 459e12),
    "TPU v6 lite": Chip(32 * GIB, 918e12),
    "TPU v6e": Chip(32 * GIB, 918e12),
    "NVIDIA A100": Chip(40 * GIB, 312e12),
    "NVIDIA H100": Chip(80 * GIB, 989e12),
    "NVIDIA H200": Chip(141 * GIB, 989e12),
}
UNKNOWN = 16 * GIB


def chip_of(device: Any) -> Chip | None:
    """The data sheet of a device, None for one that is not listed."""
    return next((chip for name, chip in CHIPS.items() if device.device_kind.startswith(name)), None)


def memory_of(device: Any) -> float:
    """Bytes of a device: as it says itself, as its data sheet says, or 16 GiB."""
    chip = chip_of(device)
    if chip is not None:
        return chip.memory
    try:
        stats = device.memory_stats() or {}
    except Exception:  # noqa: BLE001  # a described device, or one that does not count
        stats = {}
    return stats.get("bytes_limit", UNKNOWN)
