"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors' bytes.

Reading maps one tensor at a time and writing takes one at a time, so that host memory never holds two.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from mm_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` is in bytes from the start of the file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def map(self) -> np.ndarray:
        """The tensor as a read-only view of the file; only what is looked at is read."""
        size = math.prod(self.shape) * self.dtype.itemsize
        if not size:
            return np.zeros(self.shape, self.dtype)
        view = np.memmap(self.path, np.uint8, "r", self.offset, (size,))
        return view.view(self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name.

    Raises UserError: not a safetensors file, cut off, or a dtype that is no plain number (quantised weights).
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise UserError(f"{path} is not a safetensors file, or a part of one")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path} is not a safetensors file: its header is no JSON") from None
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(f'{path}: "{name}" has dtype {entry["dtype"]}, which is not supported')
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f'{path}: "{name}" has {end - begin} bytes, which is not {dtype} {list(shape)}')
        if 8 + length + end > size:
            raise UserError(
                f'{path} is cut off: "{name}" ends at byte {8 + length + end}, the file at {size}'
            )
        found[name] = StoredTensor(path, dtype, shape, 8 + length + begin)
    return found


@dataclass(frozen=True)
class Entry:
    """A tensor to write; `read` gives its values when their turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Writes a file, whole or not at all."""
    header: dict = {"__metadata__": {"format": "pt"}}  # the reference asks for it
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            # the format is row-major: a transposed view would otherwise be written as it lies in memory
            values = np.asarray(entry.read(), entry.dtype, order="C")
            if values.shape != entry.shape:
                raise ValueError(f"{entry.name} is {values.shape}, {entry.shape} was announced")
            file.write(values.reshape(-1).view(np.uint8))
    os.replace(temporary, path)
