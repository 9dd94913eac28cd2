"""A model that was put together from parts, as a checkpoint of the family that is built like it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_jax.checkpoint import safetensors
from mm_jax.checkpoint.hf import HFCheckpoint, read_json, small_files
from mm_jax.checkpoint.pretrained import IDS, LEFT, MEDIA, PARTS, TEMPLATE
from mm_jax.data.chat_template import read_template
from mm_jax.data.media_rule import Settings
from mm_jax.data.pretrained_tokenizer import PretrainedTokenizer
from mm_jax.errors import UserError
from mm_jax.families import FAMILIES, Names
from mm_jax.families.fields import ACTIVATIONS
from mm_jax.families.media import media_rule
from mm_jax.families.parts import DECODERS, TOWERS
from mm_jax.models import MultimodalConfig, ViTConfig

HEAD = "language_model.lm_head.weight"
# a template for texts is given each message as its parts on lines of their own
FLATTEN = (
    "{%- set ns = namespace(all=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set ns.text = message['content'] -%}"
    "{%- else -%}{%- set ns.text = '' -%}{%- for part in message['content'] -%}"
    "{%- set ns.text = ns.text + ('' if loop.first else '\n') "
    "+ ('<image>' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set ns.all = ns.all + [dict(message, content=ns.text)] -%}"
    "{%- endfor -%}{%- set messages = ns.all -%}"
)


def as_llava(processor: Path, model: MultimodalConfig) -> HFCheckpoint:
    """What a LLaVA checkpoint of the model says besides its parameters.

    Args:
      processor: directory that `mm_jax.checkpoint.pretrained.write_pretrained` wrote.

    Raises UserError that says why it is none.
    """
    if not (processor / PARTS).is_file():
        raise UserError("it was not put together from checkpoints")
    parts = read_json(processor / PARTS)
    if set(parts) != {"vision", "decoder"} or not isinstance(model.vision, ViTConfig):
        raise UserError("LLaVA has one tower, of pictures of one size")
    vision, text = (
        _part(parts["vision"], "vision_config", TOWERS),
        _part(parts["decoder"], "text_config", DECODERS),
    )
    if model.vision.post_norm:
        raise UserError("LLaVA's tower gives out hidden states without the last norm (init.vision_layers)")
    tokenizer, ids = PretrainedTokenizer.load(processor), read_json(processor / IDS)
    layers, tied = list(model.vision.feature_layers) or [-1], model.decoder.tie_embeddings
    projector = model.image_projector
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    strategy = "default" if model.vision.class_token == "drop" else "full"
    values = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": tokenizer.id(MEDIA["image"]),
        "projector_hidden_act": names[projector.activation],
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "vision_feature_select_strategy": strategy,
        "multimodal_projector_bias": projector.use_bias,
        "tie_word_embeddings": tied,
        "pad_token_id": ids["pad"],
        "dtype": model.dtype,
        "vision_config": vision | {"num_hidden_layers": model.vision.num_layers},
        "text_config": text | {"vocab_size": model.decoder.vocab_size, "tie_word_embeddings": tied},
    }
    if vision["model_type"] == "siglip_vision_model":
        values["vision_config"]["vision_use_head"] = False
    family = FAMILIES["llava"]
    system = family.system(values, Names(() if tied else (HEAD,)))
    for field in dataclasses.fields(MultimodalConfig):
        ours, theirs = getattr(model, field.name), getattr(system.config, field.name)
        if ours != theirs and field.name != "dtype":
            raise UserError(f"LLaVA has another {field.name}{_difference(ours, theirs)}")
    left = safetensors.read_header(processor / LEFT) if (processor / LEFT).is_file() else {}
    files = [
        file for file in small_files(processor) if file.name not in (IDS, PARTS, "processor_config.json")
    ]
    return HFCheckpoint(
        family,
        processor,
        model.dtype,
        values,
        tuple(ids["stop"]),
        dataclasses.replace(system, config=model),
        media_rule(system, Settings.read(processor)),
        tuple(sorted(files)),
        {f"vision_tower.{name}": tensor.map() for name, tensor in left.items()},
    )


def write_llava_files(checkpoint: HFCheckpoint, directory: Path) -> None:
    """What the reference's processor reads beside the weights: settings of pictures, a template that takes parts, and
    the tokens that end an answer."""
    processor, values = checkpoint.directory, checkpoint.values
    settings = dict(Settings.read(processor).need("image"))
    settings["do_center_crop"] = bool(settings.get("do_center_crop"))
    vision = checkpoint.system.config.vision
    found = {
        "processor_class": "LlavaProcessor",
        "image_processor": settings,
        "image_token": MEDIA["image"],
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token != "none"),
        "vision_feature_select_strategy": values["vision_feature_select_strategy"],
    }
    generation = {"eos_token_id": list(checkpoint.stop_ids), "pad_token_id": values["pad_token_id"]}
    for name, object_ in (("processor_config.json", found), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(object_, indent=2) + "\n", encoding="utf-8")
    template = FLATTEN + (read_template(processor) or TEMPLATE)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _part(values: Mapping[str, Any], name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a tower or decoder, which may stand in that of a whole system."""
    if values.get("model_type") not in known:
        kind = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(values.get("model_type"))
        values = ({} if kind is None else {"model_type": kind}) | dict(values.get(name) or {})
    if values.get("model_type") not in known:
        raise UserError(f"LLaVA's {name} has no place for the model_type {values.get('model_type')}")
    return dict(values)


def _difference(ours: Any, theirs: Any) -> str:
    """Which field of two configs differs first."""
    if type(ours) is not type(theirs) or not dataclasses.is_dataclass(ours):
        return ""
    for field in dataclasses.fields(ours):
        here, there = getattr(ours, field.name), getattr(theirs, field.name)
        if here != there:
            return f": {field.name} is {here!r} here and {there!r} there"
    return ""
