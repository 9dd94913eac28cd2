"""OPT (reference: OPTForCausalLM): layer norms with biases, learned positions, an MLP without gate."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.families.family import LINEAR, Family, Text, Weight
from mm_jax.families.fields import Fields, token_ids
from mm_jax.families.llama import text_system
from mm_jax.models import DecoderConfig

DEFAULTS = {
    "vocab_size": 50_272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
RENAMES = ((r"^decoder\.", "model.decoder."),)  # of bare models
UNUSED_ROWS = 2  # in front of the table of positions


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip("layerdrop", "init_std", "activation_dropout")  # of training
    width, heads, length = (
        fields(k) for k in ("hidden_size", "num_attention_heads", "max_position_embeddings")
    )
    first, bias = fields("do_layer_norm_before"), fields("enable_bias")
    table_width = fields("word_embed_proj_dim") or width
    config = DecoderConfig(
        vocab_size=fields("vocab_size"),
        embed_dim=width,
        num_layers=fields("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=fields("ffn_dim"),
        activation=fields.activation("activation_function"),
        gated=False,
        tie_embeddings=tied,
        token_dim=0 if table_width == width else table_width,
        positions="learned",
        num_positions=length + UNUSED_ROWS,
        position_offset=UNUSED_ROWS,
        norm="layer" if fields("layer_norm_elementwise_affine") else "layer_plain",
        norm_eps=1e-5,
        norm_place="pre" if first else "post",
        final_norm=first and not fields("_remove_final_layer_norm"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
    )
    stops, pad = fields("eos_token_id"), fields("pad_token_id")
    fields.finish()
    return Text(config, weights, length, token_ids(stops), pad)


def weights(config: DecoderConfig, model: str, head: str) -> tuple[Weight, ...]:
    """See `mm_jax.families.llama.weights`."""
    decoder = f"{model}decoder."
    layer, ours = decoder + "layers.{}.", "decoder/layers/"

    def linear(name: str, path: str, bias: bool) -> list[Weight]:
        found = [Weight(f"{name}.weight", f"{path}/kernel", LINEAR)]
        return found + [Weight(f"{name}.bias", f"{path}/bias")] * bias

    def norm(name: str, path: str) -> list[Weight]:
        found = [Weight(f"{name}.weight", f"{path}/scale"), Weight(f"{name}.bias", f"{path}/bias")]
        return found * (config.norm == "layer")

    table = [
        Weight(f"{decoder}embed_tokens.weight", "decoder/embedding/embedding"),
        Weight(f"{decoder}embed_positions.weight", "decoder/positions/embedding"),
        *norm(f"{layer}self_attn_layer_norm", f"{ours}attention_norm"),
        *linear(f"{layer}self_attn.q_proj", f"{ours}attention/query", config.qkv_bias),
        *linear(f"{layer}self_attn.k_proj", f"{ours}attention/key", config.qkv_bias),
        *linear(f"{layer}self_attn.v_proj", f"{ours}attention/value", config.qkv_bias),
        *linear(f"{layer}self_attn.out_proj", f"{ours}attention/out", config.out_bias),
        *norm(f"{layer}final_layer_norm", f"{ours}mlp_norm"),
        *linear(f"{layer}fc1", f"{ours}mlp/up", config.mlp_bias),
        *linear(f"{layer}fc2", f"{ours}mlp/down", config.mlp_bias),
    ]
    if config.token_dim:
        table += linear(f"{decoder}project_in", "decoder/project_in", False)
        table += linear(f"{decoder}project_out", "decoder/project_out", False)
    if config.final_norm:
        table += norm(f"{decoder}final_layer_norm", "decoder/norm")
    if not config.tie_embeddings:
        table += linear(head.removesuffix("."), "decoder/head", False)
    return tuple(table)


FAMILY = Family("opt", ("text",), partial(text_system, text), RENAMES)
