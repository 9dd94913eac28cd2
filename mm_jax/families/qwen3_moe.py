"""Qwen3-MoE (reference: Qwen3MoeForCausalLM): Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mm_jax.families.family import LINEAR, Family, Text, Weight
from mm_jax.families.fields import Fields
from mm_jax.families.llama import RENAMES, common, text_system
from mm_jax.families.llama import weights as llama_weights
from mm_jax.families.qwen3 import DEFAULTS as QWEN3
from mm_jax.models import DecoderConfig
from mm_jax.models.experts import ExpertConfig

EXPERTS = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DEFAULTS = {k: v for k, v in QWEN3.items() if k not in ("layer_types", "max_window_layers")} | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "head_dim": None,
    "norm_topk_prob": False,
    **EXPERTS,
}


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`; the reference's window is that of every layer."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip("max_window_layers")
    bias = fields("attention_bias")
    window = fields("sliding_window") if fields("use_sliding_window") else None
    options = {"qkv_bias": bias, "out_bias": bias, "windows": (window or 0,) * fields("num_hidden_layers")}
    found = common(fields, tied, qk_norm=True, experts=experts(fields, fields("norm_topk_prob")), **options)
    return replace(found, weights=weights)


def experts(fields: Fields, normalise: bool) -> ExpertConfig:
    """The mixture of every layer."""
    fields.skip("router_aux_loss_coef", "output_router_logits")  # of training
    if fields("decoder_sparse_step") != 1:
        raise fields.unsupported("decoder_sparse_step", "every layer has experts here")
    if fields("mlp_only_layers"):
        raise fields.unsupported("mlp_only_layers", "every layer has experts here")
    name = "num_local_experts" if "num_local_experts" in fields.values else "num_experts"
    return ExpertConfig(
        fields(name), fields("num_experts_per_tok"), fields("moe_intermediate_size"), normalise
    )


def without_mlp(config: DecoderConfig, model: str, head: str) -> list[Weight]:
    """The tensors of a decoder but for those of its experts, and the router."""
    table = [weight for weight in llama_weights(config, model, head) if "/mlp/" not in weight.path]
    router = Weight(f"{model}layers.{{}}.mlp.gate.weight", "decoder/layers/mlp/router/kernel", LINEAR)
    return [*table, router]


def weights(config: DecoderConfig, model: str, head: str) -> tuple[Weight, ...]:
    """See `mm_jax.families.llama.weights`."""
    table = without_mlp(config, model, head)
    for name in ("gate", "up", "down"):
        theirs = f"{model}layers.{{}}.mlp.experts.{{}}.{name}_proj.weight"
        table.append(Weight(theirs, f"decoder/layers/mlp/{name}", LINEAR))
    return tuple(table)


FAMILY = Family("qwen3_moe", ("text",), partial(text_system, text), RENAMES)
