"""Gemma (reference: GemmaForCausalLM): Llama with scaled embeddings and norms whose parameters are centred at 0."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.families.family import Family, Text
from mm_jax.families.fields import Fields
from mm_jax.families.llama import RENAMES, common, text_system

DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 3072,
    "intermediate_size": 24_576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`."""
    if values.get("hidden_act") == "gelu":
        values = values | {"hidden_act": "gelu_pytorch_tanh"}  # the first releases say so and mean this
    fields = Fields(values, DEFAULTS, where)
    fields.skip("hidden_activation")  # the reference reads hidden_act
    return common(fields, tied, **options(fields))


def options(fields: Fields) -> dict[str, Any]:
    """What all Gemmas have; of `DecoderConfig`."""
    bias = fields("attention_bias")
    return {
        "embed_scale": fields("hidden_size") ** 0.5,
        "norm": "rms_centred",
        "qkv_bias": bias,
        "out_bias": bias,
    }


FAMILY = Family("gemma", ("text",), partial(text_system, text), RENAMES)
