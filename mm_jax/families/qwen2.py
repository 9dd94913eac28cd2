"""Qwen2 and Qwen2.5 (reference: Qwen2ForCausalLM): Llama with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.families.family import Family, Text
from mm_jax.families.fields import Fields
from mm_jax.families.llama import DEFAULTS as LLAMA
from mm_jax.families.llama import RENAMES, common, text_system

DEFAULTS = LLAMA | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`."""
    fields = Fields(values, DEFAULTS, where)
    return common(fields, tied, qkv_bias=True, windows=windows(fields))


def windows(fields: Fields) -> tuple[int, ...]:
    """The sliding window of each layer: of those that layer_types names, or else from max_window_layers on."""
    size, used = fields("sliding_window"), fields("use_sliding_window")
    window = size if used else None  # released files give a size that is not used
    first, kinds = fields("max_window_layers"), fields("layer_types")
    if kinds is None:
        kinds = [
            "sliding_attention" if window and layer >= first else "full_attention"
            for layer in range(fields("num_hidden_layers"))
        ]
    if not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise fields.unsupported("layer_types")
    if "sliding_attention" in kinds and not window:
        raise fields.unsupported("layer_types", "sliding layers need use_sliding_window and sliding_window")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


FAMILY = Family("qwen2", ("text",), partial(text_system, text), RENAMES)
