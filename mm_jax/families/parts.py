"""The decoders and towers that systems are put together from, by the model_type of their own configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mm_jax.errors import UserError, nearest
from mm_jax.families import clip, llama, mistral, opt, qwen2, qwen3, siglip
from mm_jax.families.clip import Output
from mm_jax.families.family import Text
from mm_jax.models import ViTConfig

DECODERS: dict[str, llama.Reader] = {
    "llama": llama.text,
    "mistral": mistral.text,
    "opt": opt.text,
    "qwen2": qwen2.text,
    "qwen3": qwen3.text,
}
TOWERS: dict[str, Callable[[Mapping[str, Any], Output, str], ViTConfig]] = {
    "clip_vision_model": clip.tower,
    "siglip_vision_model": siglip.tower,
}


def read_text(values: Mapping[str, Any], tied: bool) -> Text:
    """A text_config, that of a Llama where it names no model_type."""
    kind = values.get("model_type", "llama")
    if kind not in DECODERS:
        raise UserError(f'config.json: the text_config is of "{kind}"{nearest(kind, DECODERS)}')
    return DECODERS[kind](values, tied, "config.json: text_config")


def read_tower(values: Mapping[str, Any], output: Output) -> ViTConfig:
    """The tower of a vision_config, CLIP where it names none."""
    kind = values.get("model_type", "clip_vision_model")
    if kind not in TOWERS:
        raise UserError(f'config.json: the vision_config is of "{kind}"{nearest(kind, TOWERS)}')
    return TOWERS[kind](values, output, "config.json: vision_config")
