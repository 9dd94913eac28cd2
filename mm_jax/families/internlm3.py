"""InternLM3 (reference: InternLM3Config, which runs as a Llama): Llama with two switches for the biases."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.families.family import Family, Text
from mm_jax.families.fields import Fields
from mm_jax.families.llama import DEFAULTS as LLAMA
from mm_jax.families.llama import RENAMES, common, text_system

DEFAULTS = LLAMA | {
    "vocab_size": 128_512,
    "intermediate_size": 10_240,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 2,
    "qkv_bias": False,
    "bias": False,
}


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`; released files and transformers 5 call the switches differently."""
    fields = Fields(values, DEFAULTS, where)
    qkv = fields("attention_bias" if "attention_bias" in values else "qkv_bias")
    others = fields("mlp_bias" if "mlp_bias" in values else "bias")
    return common(fields, tied, qkv_bias=qkv, out_bias=others, mlp_bias=others)


FAMILY = Family("internlm3", ("text",), partial(text_system, text), RENAMES)
