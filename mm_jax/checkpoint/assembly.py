"""A new model of parts from several checkpoints: a tower from one directory, a decoder from another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from mm_jax.checkpoint.hf import Opened, open_hf, read_weight
from mm_jax.errors import UserError
from mm_jax.families import Weight
from mm_jax.models import MultimodalConfig, NativeViTConfig, ViTConfig
from mm_jax.models.encoders import AudioConfig, VisionConfig

KINDS = {"vision": VisionConfig, "audio": AudioConfig}
# (parameter, its axis of tokens)
TABLES = {"decoder/embedding/embedding": 0, "decoder/head/kernel": 1}


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint.

    Attributes:
      name: "vision", "audio" or "decoder".
      config: of the part.
      weights: whose paths are those of a `MultimodalLM`.
    """

    opened: Opened
    name: str
    config: Any
    weights: tuple[Weight, ...]


def open_part(directory: str | Path, name: str) -> Part:
    """The tower or decoder of a Hugging Face directory, which may hold that part alone or a whole system.

    Raises UserError: no such part there, or what `mm_jax.checkpoint.hf.open_hf` raises.
    """
    opened = open_hf(directory)
    system = opened.system
    if isinstance(system.config, MultimodalConfig):
        config, prefix = getattr(system.config, name), ""
    else:
        config, prefix = (
            (system.config if isinstance(system.config, KINDS.get(name, ())) else None),
            f"{name}/",
        )
    if config is None or (name == "decoder" and prefix):
        raise UserError(f"{directory} ({opened.family.name}) has no {name} part")
    weights = [dataclasses.replace(weight, path=prefix + weight.path) for weight in system.weights]
    return Part(opened, name, config, tuple(w for w in weights if w.path.startswith(f"{name}/")))


def model_of(model: MultimodalConfig, parts: Mapping[str, Part], vocab_size: int) -> MultimodalConfig:
    """`model` with the parts in their places; the vocabulary has at least vocab_size tokens.

    A tower of patches that are not merged by its own system gets them as the projector merges them.
    """
    found: dict[str, Any] = {name: part.config for name, part in parts.items()}
    vision, (count, other) = found.get("vision"), model.image_projector.merge
    if isinstance(vision, NativeViTConfig) and vision.merge == other == 1:
        found["vision"] = dataclasses.replace(vision, merge=math.isqrt(count))
    decoder = found["decoder"]
    found["decoder"] = dataclasses.replace(decoder, vocab_size=max(decoder.vocab_size, vocab_size))
    return dataclasses.replace(model, **found)


def of_layers(part: Part, layers: tuple[int, ...], keep_class_token: bool) -> Part:
    """A vision part that gives out the hidden states of some layers, numbered as in the reference: 0 before the first
    block, -1 after the last; () for the part's own output.

    Raises UserError for layers that it does not have.
    """
    config = part.config
    if not isinstance(config, ViTConfig):
        if layers:
            raise UserError(
                f"{part.opened.directory}: this tower cannot give out the hidden states {list(layers)}"
            )
        return part
    if config.class_token != "none":
        config = dataclasses.replace(config, class_token="keep" if keep_class_token else "drop")
    if layers:
        total = config.num_layers
        found = [layer if layer >= 0 else total + 1 + layer for layer in layers]
        if not all(0 <= layer <= total for layer in found):
            raise UserError(
                f"{part.opened.directory}: hidden states {list(layers)} are asked for, the tower has {total} blocks"
            )
        last = max(*found, 1)
        config = dataclasses.replace(
            config, num_layers=last, post_norm=False, feature_layers=() if found == [last] else tuple(found)
        )
    return dataclasses.replace(part, config=config)


def read_part(
    part: Part, shapes: dict[str, tuple[int, ...]], place: Callable[[str, tuple[int, ...]], Sharding]
) -> dict[str, jax.Array]:
    """The parameters of a part in float32, by path, tensor by tensor into their places.

    Args:
      shapes: of the new model's parameters, whose vocabulary may be larger than the file's: the new tokens get the mean
        of the others.
      place: sharding of each parameter.

    Raises UserError where the part lacks a parameter, or has one of another size.
    """
    weights = {weight.path: weight for weight in part.weights if weight.path in shapes}
    lacking = {path for path in shapes if path.startswith(f"{part.name}/")} - weights.keys()
    if lacking:
        raise UserError(f"{part.opened.directory}: its {part.name} part has nothing for {sorted(lacking)[0]}")
    found = {}
    for path, weight in weights.items():
        _check_shape(part, weight, shapes[path])
        size = list(shapes[path])
        if path in TABLES:
            size[TABLES[path]] = min(part.config.vocab_size, size[TABLES[path]])
        array = read_weight(weight, part.opened.tensors, tuple(size), jnp.dtype("float32"), place)
        if array.shape != shapes[path]:
            array = _longer(array, TABLES[path], shapes[path], place(path, shapes[path]))
        found[path] = array
    return found


def _check_shape(part: Part, weight: Weight, shape: tuple[int, ...]) -> None:
    """A vocabulary may be smaller than the model's, and of a tower the first blocks are enough."""
    known = part.opened.shapes
    stored = known.get(weight.path) or known[weight.path.removeprefix(f"{part.name}/")]
    cut = part.name == "vision" and weight.depth > 0
    fits = len(stored) == len(shape) and all(
        there == here or (there < here if TABLES.get(weight.path) == k else cut and k == 0 and there > here)
        for k, (there, here) in enumerate(zip(stored, shape, strict=True))
    )
    if not fits:
        raise UserError(
            f"{part.opened.directory}: {weight.path} is {list(stored)} there and {list(shape)} in this model"
        )


def _longer(array: jax.Array, axis: int, shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    """The table of `shape`, in which the mean stands for each new token."""

    def more(x: jax.Array) -> jax.Array:
        new = list(x.shape)
        new[axis] = shape[axis] - x.shape[axis]
        return jnp.concatenate([x, jnp.broadcast_to(x.mean(axis, keepdims=True), new)], axis)

    return jax.jit(more, out_shardings=sharding)(array)
