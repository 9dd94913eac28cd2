"""What a run keeps of the Hugging Face checkpoint that it began with: everything but the weights that it may change.

So a run goes on, answers, and is written as such a checkpoint again, wherever the first one has gone.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np

from mm_jax.checkpoint import safetensors
from mm_jax.checkpoint.hf import HFCheckpoint, Opened, copy_below, family_of, read_json, small_files, stop_ids
from mm_jax.checkpoint.safetensors import Entry
from mm_jax.data.media_rule import Settings
from mm_jax.errors import UserError
from mm_jax.families import Names
from mm_jax.families.media import media_rule
from mm_jax.models import MultimodalConfig

TENSORS = "tensors.json"
UNUSED = "unused.safetensors"


def keep(opened: Opened, directory: Path) -> None:
    """Writes config.json, the small files, the names and shapes of all tensors, and the tensors that the model does not
    compute with."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in small_files(opened.directory):
        copy_below(file, opened.directory, directory)
    system = opened.system
    if system.template_first and system.template:  # here the file comes first: a run may have one of its own
        (directory / "chat_template.jinja").write_text(system.template, encoding="utf-8")
    shapes = {name: list(tensor.shape) for name, tensor in opened.tensors.items()}
    for name, values in (("config.json", opened.values), (TENSORS, shapes)):
        (directory / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if opened.unused:
        arrays = ((name, opened.tensors[name].map()) for name in opened.unused)
        safetensors.write(
            directory / UNUSED, [Entry(name, x.dtype, x.shape, partial(np.asarray, x)) for name, x in arrays]
        )


def is_kept(directory: Path) -> bool:
    """Whether `keep` wrote it."""
    return (directory / TENSORS).is_file()


def open_kept(directory: Path, model: MultimodalConfig) -> HFCheckpoint:
    """What `keep` wrote, for a model that computes in the dtype of `model`. Raises UserError for damaged files."""
    values, shapes = read_json(directory / "config.json"), read_json(directory / TENSORS)
    family = family_of(directory, values)
    system = family.system(values, Names.of({name: tuple(shape) for name, shape in shapes.items()}))
    if dataclasses.replace(system.config, dtype=model.dtype) != model:
        raise UserError(f"{directory / 'config.json'} is of another model than the run's config.json")
    unused = safetensors.read_header(directory / UNUSED) if (directory / UNUSED).is_file() else {}
    return HFCheckpoint(
        family,
        directory,
        model.dtype,
        values,
        stop_ids(directory, system),
        dataclasses.replace(system, config=model),
        media_rule(system, Settings.read(directory)),
        tuple(sorted(file for file in small_files(directory) if file.name != TENSORS)),
        {name: tensor.map() for name, tensor in unused.items()},
    )
