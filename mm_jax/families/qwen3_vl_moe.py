"""Qwen3-VL with experts (reference: Qwen3VLMoeForConditionalGeneration)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mm_jax.families.family import Family, Names, Part, System, Text, Weight
from mm_jax.families.fields import Fields
from mm_jax.families.qwen3_moe import EXPERTS, experts, without_mlp
from mm_jax.families.qwen3_vl import TEXT as QWEN3_VL
from mm_jax.families.qwen3_vl import read_fields, system
from mm_jax.models import DecoderConfig

TEXT = QWEN3_VL | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": None,
    **EXPERTS,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
}


def text(values: Mapping[str, Any], tied: bool, where: str, shapes: Mapping[str, tuple[int, ...]]) -> Text:
    """See `mm_jax.families.llama.text`; the weights of the chosen experts always add up to 1."""
    fields = Fields(values, TEXT, where)
    fields.skip("norm_topk_prob")
    found = read_fields(fields, tied, experts=experts(fields, True))
    # released files have [experts, in, out], version 5 writes [experts, out, in]; the reference looks at the shape too
    width, mixture = found.decoder.embed_dim, found.decoder.experts
    given = shapes.get("model.language_model.layers.0.mlp.experts.gate_up_proj", ())
    released = given[1:] == (width, 2 * mixture.mlp_dim) and width != 2 * mixture.mlp_dim
    return replace(found, weights=partial(weights, released))


def weights(released: bool, config: DecoderConfig, model: str, head: str) -> tuple[Weight, ...]:
    """See `mm_jax.families.llama.weights`; the experts of a layer are one tensor."""
    theirs, ours = f"{model}layers.{{}}.mlp.experts.", "decoder/layers/mlp/"
    width = config.experts.mlp_dim
    table = without_mlp(config, model, head)
    axes = "e i o" if released else "e o i"
    for k, name in enumerate(("gate", "up")):
        part = Part(k * width, (k + 1) * width, 2 * width, f"{axes} -> o e i")
        table.append(Weight(f"{theirs}gate_up_proj", f"{ours}{name}", "o e i -> e i o", part=part))
    return (*table, Weight(f"{theirs}down_proj", f"{ours}down", f"{axes} -> e i o"))


def _system(values: Mapping[str, Any], names: Names) -> System:
    return system(partial(text, shapes=names.shapes), values, names)


FAMILY = Family("qwen3_vl_moe", ("text", "image", "video"), _system)
