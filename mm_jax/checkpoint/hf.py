"""Hugging Face checkpoints in and out: config.json and safetensors to our parameters, and back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from mm_jax.checkpoint import safetensors
from mm_jax.checkpoint.safetensors import Entry, StoredTensor
from mm_jax.data.media_rule import MediaRule, Settings
from mm_jax.errors import UserError, nearest
from mm_jax.families import ARCHITECTURES, FAMILIES, Family, Names, System, Weight
from mm_jax.families.fields import token_ids
from mm_jax.families.media import media_rule
from mm_jax.models import (
    MultimodalConfig,
    MultimodalLM,
    NativeViTConfig,
    dummy_batch,
    dummy_inputs,
    encoder,
)

INDEX = "model.safetensors.index.json"
SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # besides weights
# tables that the reference computes itself and that old files hold nevertheless
COMPUTED = ("*rotary_emb.inv_freq", "*.position_ids")
FLOATS = ("float32", "bfloat16")

Params = dict[str, Any]
Place = Callable[[str, tuple[int, ...]], Sharding]  # (path, shape) -> where a parameter goes


@dataclass(frozen=True)
class HFCheckpoint:
    """What a Hugging Face directory says besides the values of the parameters.

    Attributes:
      directory: it.
      dtype: of the computation.
      values: config.json.
      stop_ids: the tokens that end an answer.
      rule: how its media become arrays and tokens.
      files: small files that belong to the checkpoint (tokenizer, preprocessor), copied on saving.
      unused: tensors that the model does not compute with, as views of their files.
    """

    family: Family
    directory: Path
    dtype: str
    values: dict[str, Any]
    stop_ids: tuple[int, ...]
    system: System
    rule: MediaRule
    files: tuple[Path, ...]
    unused: dict[str, np.ndarray]


def is_hf(directory: str | Path) -> bool:
    """Whether the directory holds a config.json with a model_type."""
    path = Path(directory) / "config.json"
    return path.is_file() and "model_type" in read_json(path)


@dataclass(frozen=True)
class Opened:
    """A directory of which only the small files and the headers of the large ones have been read.

    Attributes:
      values: config.json.
      tensors: by their names in `System.weights`.
      shapes: of our parameters, by path.
      unused: names of tensors that the model does not compute with.
      dtype: of the largest tensor.
    """

    directory: Path
    family: Family
    values: dict[str, Any]
    system: System
    tensors: Mapping[str, StoredTensor]
    shapes: Mapping[str, tuple[int, ...]]
    unused: Sequence[str]

    @property
    def dtype(self) -> str:
        return max(self.tensors.values(), key=lambda tensor: math.prod(tensor.shape)).dtype.name

    def rule(self) -> MediaRule:
        """How its media become arrays and tokens."""
        return media_rule(self.system, Settings.read(self.directory))


def open_hf(directory: str | Path) -> Opened:
    """What a directory holds. Raises UserError as `load_hf` does."""
    directory = Path(directory)
    values = read_json(directory / "config.json")
    family = family_of(directory, values)
    tensors = _canonical(_tensors(directory), family.renames)
    system = family.system(values, Names.of({name: tensor.shape for name, tensor in tensors.items()}))
    shapes = abstract_params(system.config)
    unused = _check(directory, tensors, system, shapes)
    return Opened(directory, family, values, system, tensors, shapes, unused)


def family_of(directory: Path, values: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises UserError for one that is not known."""
    for name in values.get("architectures") or ():
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f'{directory}: the model_type "{kind}" is not known{nearest(str(kind), FAMILIES)}')
    return FAMILIES[kind]


def load_hf(
    directory: str | Path, dtype: str | None = None, place: Place | None = None
) -> tuple[HFCheckpoint, Params]:
    """A checkpoint and its parameters, read tensor by tensor into the arrays' final places.

    Args:
      directory: with config.json and model.safetensors, or its shards and their index.
      dtype: of parameters and computation; None for that of the file, where float16 is computed with in float32.
      place: sharding of each parameter; None for the first device.

    Raises:
        UserError: an unknown model_type, unsupported config, pickled weights, damaged files, or tensors that are
            missing, unexpected or of another shape (all named in one message).
    """
    if dtype is not None and dtype not in FLOATS:
        raise UserError(f'dtype is "{dtype}"{nearest(str(dtype), FLOATS)}')
    opened = open_hf(directory)
    system, tensors, shapes = opened.system, opened.tensors, opened.shapes
    cast = None if dtype is None else jnp.dtype(dtype)
    dtype = dtype or opened.dtype
    if dtype == "float16":
        dtype = "float32"  # TPUs and CPUs do not compute in it, and bfloat16 has fewer digits
    if isinstance(system.config, MultimodalConfig):
        system = dataclasses.replace(system, config=dataclasses.replace(system.config, dtype=dtype))
    place = place or (lambda path, shape: SingleDeviceSharding(jax.devices()[0]))
    params = {
        weight.path: read_weight(weight, tensors, shapes[weight.path], cast, place)
        for weight in system.weights
    }
    checkpoint = HFCheckpoint(
        opened.family,
        opened.directory,
        dtype,
        opened.values,
        stop_ids(opened.directory, system),
        system,
        opened.rule(),
        tuple(sorted(small_files(opened.directory))),
        {name: tensors[name].map() for name in opened.unused},
    )
    return checkpoint, unflatten_dict(params, sep="/")


def abstract_params(config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model or tower, by path."""
    if isinstance(config, MultimodalConfig):
        init, inputs = MultimodalLM(config).init, [dummy_batch(config)]
    else:
        init, inputs = encoder(config).init, list(dummy_inputs(config).values())
        if isinstance(config, NativeViTConfig):  # whose patches stand in rows
            inputs = [array[None] for array in inputs]
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs)["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values


def stop_ids(directory: Path, system: System) -> tuple[int, ...]:
    """The tokens that end an answer."""
    path = directory / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    default = system.text.stop_ids if system.text else ()
    return tuple(dict.fromkeys((*(token_ids(found) or default), *system.stops)))


def _tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by the name in its file."""
    single = directory / "model.safetensors"
    if single.is_file():
        return safetensors.read_header(single)
    if (directory / INDEX).is_file():
        index = read_json(directory / INDEX)["weight_map"]
        lost = sorted({file for file in index.values() if not (directory / file).is_file()})
        if lost:
            raise UserError(f"{directory}: {INDEX} names files that are not there: {', '.join(lost)}")
        shards = {file: safetensors.read_header(directory / file) for file in set(index.values())}
        lost = sorted(name for name, file in index.items() if name not in shards[file])
        if lost:
            raise UserError(f"{directory}: {INDEX} names tensors that are not in its files: {_some(lost)}")
        return {name: shards[file][name] for name, file in index.items()}
    pickled = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise UserError(
            f"{directory} holds pickled weights ({_some(pickled)}), which can run any code when they are read; convert "
            "them where you trust them: AutoModel.from_pretrained(...).save_pretrained(...) writes safetensors"
        )
    raise UserError(f"{directory} has neither model.safetensors nor {INDEX}")


def _canonical(
    tensors: dict[str, StoredTensor], renames: Sequence[tuple[str, str]]
) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if any(fnmatch(name, pattern) for pattern in COMPUTED):
            continue
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise UserError(f'{tensor.path}: "{name}" is there twice, under two spellings')
        found[name] = tensor
    return found


def _check(
    directory: Path,
    tensors: Mapping[str, StoredTensor],
    system: System,
    shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """The unused tensors' names; raises UserError for all that does not fit."""
    expected = {
        name: weight.their_shape(shapes[weight.path])
        for weight in system.weights
        for name in weight.names(shapes[weight.path])
    }
    others = [name for name in tensors if name not in expected]
    unused = [name for name in others if any(fnmatch(name, pattern) for pattern in system.unused)]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": sorted(set(others) - set(unused)),
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    said = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    if said:
        raise UserError(f"{directory}: the tensors do not fit config.json; " + "; ".join(said))
    return unused


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_weight(
    weight: Weight,
    tensors: Mapping[str, StoredTensor],
    shape: tuple[int, ...],
    dtype: np.dtype | None,
    place: Place,
) -> jax.Array:
    """One parameter, read layer by layer: no more than one layer of it is on the host."""
    sharding = place(weight.path, shape)
    names = weight.names(shape)
    dtype = dtype or tensors[names[0]].dtype

    def array(names: list[str], shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
        def one(name: str, index: tuple[slice, ...]) -> np.ndarray:
            return np.ascontiguousarray(weight.ours(tensors[name].map())[index], dtype)

        def block(index: tuple[slice, ...]) -> np.ndarray:
            if weight.depth < 2:
                return one(names[0], index)
            return np.stack([one(name, index[1:]) for name in names[index[0]]])

        return jax.make_array_from_callback(shape, sharding, block)

    if not weight.depth:
        return array(names, shape, sharding)
    whole = jnp.zeros(shape, dtype, device=sharding)
    each = len(names) // shape[0]
    for k in range(shape[0]):
        layer = array(names[k * each : (k + 1) * each], shape[1:], _of_layer(sharding))
        whole = _put(whole, layer, k)
        whole.block_until_ready()  # or the layers would queue up on the host
    return whole


@partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, layer: jax.Array, k: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, layer, k, 0)


def _of_layer(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def small_files(directory: Path) -> Iterator[Path]:
    """Those that belong to a checkpoint besides weights and config.json: tokenizers, templates, settings."""
    for path in (*directory.iterdir(), *directory.glob("*_tokenizer/*")):
        weights = path.name.startswith("model") or path.suffix not in SMALL
        if path.is_file() and not weights and path.name != "config.json":
            yield path


def copy_below(file: Path, old: Path, new: Path) -> None:
    """Copies a file somewhere in the directory `old` to the same place in `new`."""
    place = new / file.relative_to(old)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, place)


def save_hf(
    directory: str | Path,
    checkpoint: HFCheckpoint,
    params: Params,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a directory that the reference loads: weights in the parameters' dtypes, config.json, tokenizer files.

    Args:
      checkpoint: what the parameters were loaded from.
      shard_bytes: weights beyond this size are split into several files with an index.
      progress: told how many bytes have been written, after each file.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = flatten_dict(params, sep="/")
    parts: dict[tuple, list[Weight]] = {}  # a tensor of theirs may be made of several parameters
    for weight in checkpoint.system.weights:
        parts.setdefault((weight.name, weight.first, weight.step), []).append(weight)
    entries = [e for weights in parts.values() for e in _entries(weights, flat)]
    entries += [
        Entry(name, array.dtype, array.shape, partial(np.asarray, array))
        for name, array in checkpoint.unused.items()
    ]
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.size for e in shards[-1]) + entry.size > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    old = set(directory.glob("model*.safetensors")) | {directory / INDEX}
    if len(shards) == 1:
        files = [directory / "model.safetensors"]
    else:
        count = len(shards)
        files = [directory / f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    for file, shard in zip(files, shards, strict=True):
        safetensors.write(file, shard)
        if progress is not None:
            progress(sum(entry.size for entry in shard))
    for file in old - set(files):
        file.unlink(missing_ok=True)  # of an earlier checkpoint in the same place
    if len(shards) > 1:
        index = {e.name: f.name for f, shard in zip(files, shards, strict=True) for e in shard}
        total = {"total_size": sum(e.size for e in entries)}
        (directory / INDEX).write_text(json.dumps({"metadata": total, "weight_map": index}, indent=2) + "\n")
    for file in checkpoint.files:
        if file.is_file() and checkpoint.directory.resolve() != directory.resolve():
            copy_below(file, checkpoint.directory, directory)
    largest = max(flat.values(), key=lambda x: x.size)
    config = _with_dtype(checkpoint.values, largest.dtype.name)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _entries(weights: Sequence[Weight], flat: Mapping[str, jax.Array]) -> Iterator[Entry]:
    """The tensors of one name: one, or one a layer, or one an expert and layer."""
    first, array = weights[0], flat[weights[0].path]

    def read(k: tuple[int, ...]) -> np.ndarray:
        arrays = (flat[weight.path] for weight in weights)
        return first.joined([w.theirs(np.asarray(a[k])) for w, a in zip(weights, arrays, strict=True)])

    shape = first.their_shape(array.shape)
    for k, name in zip(np.ndindex(array.shape[: first.depth]), first.names(array.shape), strict=True):
        yield Entry(name, np.dtype(array.dtype), shape, partial(read, k))


def _with_dtype(values: Any, dtype: str) -> Any:
    """config.json with what it says of the dtype, at any depth, put right."""
    if not isinstance(values, dict):
        return values
    return {k: dtype if k in ("dtype", "torch_dtype") else _with_dtype(v, dtype) for k, v in values.items()}
