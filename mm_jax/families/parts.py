"""The decoders and towers that systems are put together from, by the model_type of their own configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mm_jax.errors import UserError, nearest
from mm_jax.families import (
    clip,
    gemma,
    gemma2,
    gemma3_text,
    intern_vit,
    internlm2,
    internlm3,
    llama,
    mistral,
    opt,
    qwen,
    qwen2,
    qwen3,
    qwen3_5,
    siglip,
)
from mm_jax.families.clip import Output
from mm_jax.families.family import Text
from mm_jax.models import ViTConfig

DECODERS: dict[str, llama.Reader] = {
    "gemma": gemma.text,
    "gemma2": gemma2.text,
    "gemma3_text": gemma3_text.text,
    "internlm2": internlm2.text,
    "internlm3": internlm3.text,
    "llama": llama.text,
    "mistral": mistral.text,
    "opt": opt.text,
    "qwen": qwen.text,
    "qwen2": qwen2.text,
    "qwen3": qwen3.text,
    "qwen3_5_text": qwen3_5.text,
}
TOWERS: dict[str, Callable[[Mapping[str, Any], Output, str], ViTConfig]] = {
    "clip_vision_model": clip.tower,
    "internvl_vision": intern_vit.tower,
    "siglip_vision_model": siglip.tower,
}


def read_text(
    values: Mapping[str, Any], tied: bool, default: str = "llama", where: str = "text_config"
) -> Text:
    """The text config called `where`, that of a `default` where it names no model_type."""
    kind = values.get("model_type", default)
    if kind not in DECODERS:
        raise UserError(f'config.json: the {where} is of "{kind}"{nearest(kind, DECODERS)}')
    return DECODERS[kind](values, tied, f"config.json: {where}")


def read_tower(values: Mapping[str, Any], output: Output, default: str = "clip_vision_model") -> ViTConfig:
    """The tower of a vision_config, a `default` where it names none."""
    kind = values.get("model_type", default)
    if kind not in TOWERS:
        raise UserError(f'config.json: the vision_config is of "{kind}"{nearest(kind, TOWERS)}')
    return TOWERS[kind](values, output, "config.json: vision_config")
