"""Qwen3, dense (reference: Qwen3ForCausalLM): norms on query and key heads, head_dim of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.families.family import Family, Text
from mm_jax.families.fields import Fields
from mm_jax.families.llama import RENAMES, common, text_system
from mm_jax.families.qwen2 import DEFAULTS as QWEN2
from mm_jax.families.qwen2 import windows

DEFAULTS = QWEN2 | {"head_dim": 128, "attention_bias": False}


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`."""
    fields = Fields(values, DEFAULTS, where)
    bias = fields("attention_bias")
    return common(fields, tied, qkv_bias=bias, out_bias=bias, qk_norm=True, windows=windows(fields))


FAMILY = Family("qwen3", ("text",), partial(text_system, text), RENAMES)
