"""What a run begins with: model sizes, tokenizer and weights, fresh, of another run, or of checkpoints."""

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import SingleDeviceSharding

from mm_jax.checkpoint.assembly import Part, model_of, of_layers, open_part, read_part
from mm_jax.checkpoint.hf import Place, abstract_params, open_hf, read_weight
from mm_jax.checkpoint.kept import is_kept, keep, open_kept
from mm_jax.checkpoint.pretrained import (
    is_pretrained,
    load_pretrained,
    prepared,
    processor_of,
    vocabulary,
    write_pretrained,
)
from mm_jax.checkpoint.run import load_params
from mm_jax.data.messages import Conversation
from mm_jax.data.pretrained import PretrainedProcessor
from mm_jax.data.processor import Processor, fit_processor
from mm_jax.errors import UserError
from mm_jax.models import DecoderConfig, MultimodalConfig, MultimodalLM, dummy_batch
from mm_jax.train.config import InitConfig, RunConfig, read_config
from mm_jax.train.partition import matching

PARTS = ("vision", "audio", "decoder")


def open_parts(init: InitConfig) -> dict[str, Part]:
    """The checkpoints that `init` names. Raises UserError for what cannot be used."""
    parts = {name: open_part(getattr(init, name), name) for name in PARTS if getattr(init, name)}
    if "vision" in parts:
        parts["vision"] = of_layers(parts["vision"], init.vision_layers, init.keep_class_token)
    return {name: prepared(part, init.audio_seconds) for name, part in parts.items()}


def planned_config(config: RunConfig) -> RunConfig:
    """`config` with the sizes of its checkpoints where these are at hand, with its own otherwise.

    Raises UserError where it has none.
    """
    needed = config.init.checkpoint or config.init.decoder
    if not needed or Path(needed).is_dir():
        return complete_config(config)
    if config.model.decoder == DecoderConfig():
        raise UserError(f"there is no directory {needed}, and `model` says nothing of the decoder's sizes")
    return config


def complete_config(config: RunConfig, run_dir: Path | None = None) -> RunConfig:
    """`config` with the sizes of what it takes from checkpoints.

    A run that has begun knows them itself, and goes on without the checkpoints.

    Raises UserError for checkpoints that cannot be used.
    """
    init, known = config.init, None
    if not init.pretrained:
        return config
    if run_dir and (run_dir / "config.json").exists() and (saved := read_config(run_dir)).init == init:
        known = saved.model
    if init.checkpoint:
        model = known or open_hf(init.checkpoint).system.config
        if not isinstance(model, MultimodalConfig):
            raise UserError(
                f"init.checkpoint: {init.checkpoint} holds an encoder alone; name it as a part instead"
            )
        return dataclasses.replace(config, model=dataclasses.replace(model, dtype=config.model.dtype))
    if known is not None:
        found = {name: getattr(known, name) for name in PARTS if getattr(init, name)}
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **found))
    parts = open_parts(init)
    return dataclasses.replace(config, model=model_of(config.model, parts, vocabulary(parts)))


def write_processor(config: RunConfig, conversations: Iterable[Conversation], directory: Path) -> None:
    """The processor that the run is to have: fitted to its texts, or that of where its weights come from."""
    if config.init.checkpoint:
        keep(open_hf(config.init.checkpoint), directory)
    elif config.init.decoder:
        write_pretrained(open_parts(config.init), directory)
    elif not config.init.run:
        fit_processor(config.processor, conversations, config.vocab_size).save(directory)
    elif config.processor is None:
        shutil.copytree(Path(config.init.run) / "processor", directory)
    else:
        known = load_processor(Path(config.init.run), config.model)
        if not isinstance(known, Processor):
            raise UserError("processor must be None: init.run has a tokenizer from a checkpoint")
        targets = dataclasses.replace(config.processor.targets, labels=known.config.targets.labels)
        Processor(dataclasses.replace(config.processor, targets=targets), known.tokenizer).save(directory)
    if config.init.template:  # this file comes before all others that may hold one
        (directory / "chat_template.jinja").write_text(config.init.template, encoding="utf-8")


def load_processor(run_dir: Path, model: MultimodalConfig) -> Processor | PretrainedProcessor:
    """That of a run. Raises UserError for missing or damaged files."""
    directory = run_dir / "processor"
    if is_kept(directory):
        return processor_of(open_kept(directory, model), model)
    return load_pretrained(directory, model) if is_pretrained(directory) else Processor.load(directory)


def first_params(config: RunConfig, model: MultimodalConfig, shardings: Any = None) -> dict[str, Any]:
    """The parameters that a run begins with; the same seed gives the same bits.

    Args:
      model: with all its sizes.
      shardings: tree of where the parameters go; None for the first device.

    Raises UserError: weights that do not fit the model.
    """
    init, shapes = config.init, abstract_params(model)
    places = {} if shardings is None else flatten_dict(shardings, sep="/")
    first = SingleDeviceSharding(jax.local_devices()[0])
    taken: dict[str, jax.Array] = {}
    if init.run:
        taken = _of_run(init, shapes, lambda path, shape: places.get(path, first))
    elif init.checkpoint:
        taken = _of_checkpoint(init, shapes, lambda path, shape: places.get(path, first))
    elif init.decoder:
        for part in open_parts(init).values():
            taken |= read_part(part, shapes, lambda path, shape: places.get(path, first))

    def fresh(key: jax.Array) -> dict[str, jax.Array]:
        params = flatten_dict(MultimodalLM(model).init(key, dummy_batch(model))["params"], sep="/")
        return {path: x for path, x in params.items() if path not in taken}

    rest = {path: places.get(path, first) for path in shapes if path not in taken}
    made = jax.jit(fresh, out_shardings=rest)(jax.random.key(config.seed))
    return unflatten_dict(taken | made, sep="/")


def _of_checkpoint(
    init: InitConfig, shapes: dict[str, tuple[int, ...]], place: Place
) -> dict[str, jax.Array]:
    """The weights of a whole system but for those that are to be fresh; of some parts those of other directories."""
    opened, found = open_hf(init.checkpoint), {}
    left = shapes.keys() - matching(shapes, init.fresh, "init.fresh")
    for name in PARTS:
        if directory := getattr(init, name):
            if not any(path.startswith(f"{name}/") for path in shapes):
                raise UserError(f"init.{name}: {init.checkpoint} has no such part")
            found |= read_part(open_part(directory, name), shapes, place)
    for weight in opened.system.weights:
        if weight.path in left - found.keys():
            shape = shapes[weight.path]
            found[weight.path] = read_weight(weight, opened.tensors, shape, jnp.dtype("float32"), place)
    return {path: x for path, x in found.items() if path in left}


def _of_run(init: InitConfig, shapes: dict[str, tuple[int, ...]], place: Place) -> dict[str, jax.Array]:
    """The weights of the parts that a run and the new model share."""
    here = SingleDeviceSharding(jax.local_devices()[0])  # for what will not be used

    def where(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        return place(path, shape) if shapes.get(path) == shape else here

    found = flatten_dict(load_params(init.run, init.stage or None, where), sep="/")
    shared = {path.split("/")[0] for path in found} & {path.split("/")[0] for path in shapes}
    for path in sorted(found.keys() | shapes.keys()):
        ours, theirs = shapes.get(path, "absent"), getattr(found.get(path), "shape", "absent")
        if path.split("/")[0] in shared and ours != theirs:
            raise UserError(f"init.run: {path} is {theirs} in {init.run} and {ours} in this config")
    return {path: x for path, x in found.items() if path.split("/")[0] in shared}
