"""Our own format for the weights of a model that is of no Hugging Face family.

A directory with config.json, the parameters by their paths in safetensors, and the processor of the run that they are
of. It is a run's result without optimizer and data, in files that other programs can read.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mm_jax.checkpoint import safetensors
from mm_jax.checkpoint.hf import FLOATS, Place, abstract_params, is_hf, read_json
from mm_jax.checkpoint.safetensors import Entry
from mm_jax.errors import UserError, nearest
from mm_jax.models import MultimodalConfig
from mm_jax.serialize import from_json, to_json

KIND = "mm_jax"
WEIGHTS, PROCESSOR = "model.safetensors", "processor"


def is_own(directory: str | Path) -> bool:
    """Whether `save_own` wrote it."""
    return is_hf(directory) and read_json(Path(directory) / "config.json")["model_type"] == KIND


def save_own(
    directory: Path,
    config: MultimodalConfig,
    params: Any,
    processor: Path,
    max_length: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes the directory.

    Args:
      processor: directory of the processor in the run.
      max_length: most tokens of prompt and answer together.
      progress: told how many bytes have been written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    flat = flatten_dict(params, sep="/")
    entries = [Entry(path, np.dtype(x.dtype), x.shape, partial(np.asarray, x)) for path, x in flat.items()]
    safetensors.write(directory / WEIGHTS, entries)
    if progress is not None:
        progress(sum(entry.size for entry in entries))
    shutil.copytree(processor, directory / PROCESSOR)
    dtype = next(iter(flat.values())).dtype.name
    model = dataclasses.replace(config, dtype=dtype)
    values = {"model_type": KIND, "max_length": max_length, "model": to_json(model)}
    (directory / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def load_own(
    directory: Path, dtype: str | None = None, place: Place | None = None
) -> tuple[MultimodalConfig, Any, int]:
    """(config, params, max_length) of what `save_own` wrote.

    Args:
      dtype: of parameters and computation; None for that of the file.
      place: sharding of each parameter; None for the first device.

    Raises UserError for damaged files and parameters that do not fit the config.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f'dtype is "{dtype}"{nearest(str(dtype), FLOATS)}')
    config, length = read_own(directory)
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    tensors = safetensors.read_header(directory / WEIGHTS)
    shapes = abstract_params(config)
    wrong = [
        path for path in sorted(shapes.keys() | tensors.keys())
        if path not in shapes or path not in tensors or tensors[path].shape != shapes[path]
    ]  # fmt: skip
    if wrong:
        raise UserError(f"{directory}: the tensors do not fit config.json: {', '.join(wrong[:8])}")

    def read(path: str) -> jax.Array:
        array = np.asarray(tensors[path].map()).astype(jnp.dtype(config.dtype))
        return jax.device_put(array, place(path, array.shape) if place else jax.devices()[0])

    return config, unflatten_dict({path: read(path) for path in shapes}, sep="/"), length


def read_own(directory: str | Path) -> tuple[MultimodalConfig, int]:
    """(config, max_length) alone; the config's dtype is that of the parameters. Raises UserError for a damaged file."""
    path = Path(directory) / "config.json"
    values = read_json(path)
    if lost := {"model", "max_length"} - values.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(lost))}")
    return from_json(MultimodalConfig, values["model"], str(path)), values["max_length"]
