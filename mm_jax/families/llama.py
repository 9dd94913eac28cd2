"""Llama 1 to 3 (reference: LlamaForCausalLM), and the table of weights of everything shaped like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mm_jax.families.family import LINEAR, Family, System, Text, Weight
from mm_jax.families.fields import Fields, token_ids
from mm_jax.models import DecoderConfig, MultimodalConfig, RopeScaling
from mm_jax.models.decoder import Kind

DEFAULTS = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "eos_token_id": 2,
    "pad_token_id": None,
}

# (values of a text config, whether there is no head of its own, where in the file)
Reader = Callable[[Mapping[str, Any], bool, str], Text]

# bare models are saved without the prefix
RENAMES = ((r"^(embed_tokens|layers|norm)\.", r"model.\1."),)


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """Reads a text config. Raises UserError for what is not supported."""
    fields = Fields(values, DEFAULTS, where)
    bias = fields("attention_bias")
    return common(fields, tied, qkv_bias=bias, out_bias=bias, mlp_bias=fields("mlp_bias"))


def common(
    fields: Fields,
    tied: bool,
    activation: str = "hidden_act",
    rope: tuple[float, RopeScaling | None] | None = None,
    **options: Any,
) -> Text:
    """The fields that all families of this shape share.

    Args:
      activation: the name of its field.
      rope: base and scaling; None to read them.
      options: of `DecoderConfig`.
    """
    heads, width, length = (
        fields(k) for k in ("num_attention_heads", "hidden_size", "max_position_embeddings")
    )
    theta, scaling = rope or fields.rope(length)
    config = DecoderConfig(
        vocab_size=fields("vocab_size"),
        embed_dim=width,
        num_layers=fields("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields("num_key_value_heads") or heads,
        head_dim=fields("head_dim") or width // heads,
        mlp_dim=fields("intermediate_size"),
        activation=fields.activation(activation),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields("rms_norm_eps"),
        tie_embeddings=tied,
        **options,
    )
    stops, pad = fields("eos_token_id"), fields("pad_token_id")
    fields.finish()
    return Text(config, weights, length, token_ids(stops), pad)


def weights(config: DecoderConfig, model: str, head: str) -> tuple[Weight, ...]:
    """The tensors of a decoder whose names begin with `model` and `head`."""
    layer, ours = model + "layers.{}.", "decoder/layers/"

    def linear(name: str, path: str, bias: bool) -> list[Weight]:
        found = [Weight(f"{layer}{name}.weight", f"{ours}{path}/kernel", LINEAR)]
        return found + [Weight(f"{layer}{name}.bias", f"{ours}{path}/bias")] * bias

    both = config.norm_place == "both"
    before_mlp = "pre_feedforward_layernorm" if both else "post_attention_layernorm"
    table = [
        Weight(f"{model}embed_tokens.weight", "decoder/embedding/embedding"),
        Weight(f"{layer}input_layernorm.weight", f"{ours}attention_norm/scale"),
        *linear("self_attn.q_proj", "attention/query", config.qkv_bias),
        *linear("self_attn.k_proj", "attention/key", config.qkv_bias),
        *linear("self_attn.v_proj", "attention/value", config.qkv_bias),
        *linear("self_attn.o_proj", "attention/out", config.out_bias),
        Weight(f"{layer}{before_mlp}.weight", f"{ours}mlp_norm/scale"),
        *linear("mlp.gate_proj", "mlp/gate", config.mlp_bias),
        *linear("mlp.up_proj", "mlp/up", config.mlp_bias),
        *linear("mlp.down_proj", "mlp/down", config.mlp_bias),
        Weight(f"{model}norm.weight", "decoder/norm/scale"),
    ]
    if both:
        table += [
            Weight(f"{layer}post_attention_layernorm.weight", f"{ours}attention_out_norm/scale"),
            Weight(f"{layer}post_feedforward_layernorm.weight", f"{ours}mlp_out_norm/scale"),
        ]
    if config.qk_norm:
        table += [
            Weight(f"{layer}self_attn.q_norm.weight", f"{ours}attention/query_norm/scale"),
            Weight(f"{layer}self_attn.k_norm.weight", f"{ours}attention/key_norm/scale"),
        ]
    if not config.tie_embeddings:
        table.append(Weight(f"{head}weight", "decoder/head/kernel", LINEAR))
    return tuple(table)


def of_kinds(
    config: DecoderConfig,
    table: Sequence[Weight],
    special: Mapping[Kind, Callable[[list[Weight], str], list[Weight]]],
) -> tuple[Weight, ...]:
    """The tensors of a decoder whose layers are of several kinds, by the periods that a scan goes over.

    Args:
      table: as if every layer had attention.
      special: of other kinds, (that of one layer of the table, how its paths begin) -> the table of one of theirs.
    """
    if config.pattern == ("attention",):
        return tuple(table)
    own, period = "decoder/layers/", len(config.pattern)
    found = [weight for weight in table if not weight.path.startswith(own)]
    for k, kind in enumerate(config.pattern):
        ours = f"{own}block{k}/"
        layer = [replace(w, path=w.path.replace(own, ours)) for w in table if w.path.startswith(own)]
        layer = special[kind](layer, ours) if kind in special else layer
        found += [replace(weight, first=k, step=period) for weight in layer]
    return tuple(found)


def text_system(reader: Reader, values: Mapping[str, Any], names: frozenset[str]) -> System:
    """A decoder alone. A head in the file is used whatever the config says of tied embeddings, as in the reference."""
    found = reader(values, "lm_head.weight" not in names, "config.json")
    return System(MultimodalConfig(None, None, decoder=found.decoder), found.table(), found)


FAMILY = Family("llama", ("text",), partial(text_system, text), RENAMES)
