"""Mistral (reference: MistralForCausalLM): Llama with a sliding window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.families.family import Family, Text
from mm_jax.families.fields import Fields
from mm_jax.families.llama import DEFAULTS as LLAMA
from mm_jax.families.llama import RENAMES, common, text_system

DEFAULTS = LLAMA | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`."""
    fields = Fields(values, DEFAULTS, where)
    window = fields("sliding_window") or 0
    return common(fields, tied, windows=(window,) * fields("num_hidden_layers"))


FAMILY = Family("mistral", ("text",), partial(text_system, text), RENAMES)
