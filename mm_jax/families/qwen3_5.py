"""Qwen3.5, dense (reference: Qwen3_5ForConditionalGeneration, Qwen3_5ForCausalLM): layers with linear attention between
those with gated attention, alone or behind the tower of Qwen3-VL without its taps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mm_jax.families import llama, qwen2_vl, qwen3_vl
from mm_jax.families.family import LINEAR, Family, Part, System, Text, Weight, linear
from mm_jax.families.fields import Fields
from mm_jax.models import DecoderConfig, DeltaConfig

DEFAULTS = {
    "vocab_size": 248_320,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": None,
    "full_attention_interval": 4,
    "attn_output_gate": True,
    "mlp_only_layers": [],
    "eos_token_id": None,
    "pad_token_id": None,
}
TURNED = 0.25  # of a head's channels
# of the whole model
MULTIMODAL = qwen2_vl.DEFAULTS | {"image_token_id": 248_056, "video_token_id": 248_057}
VISION = qwen3_vl.VISION | {"deepstack_visual_indexes": []}


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`. Text alone stands at the same place along all axes of M-RoPE."""
    fields = Fields(values, DEFAULTS, where)
    fields.rope_sections(())
    return read_fields(fields, tied)


def text_in_space(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """The same with places along three axes."""
    fields = Fields(values, DEFAULTS, where)
    sections, _ = fields.rope_sections((11, 11, 10))
    return qwen2_vl.sectioned(read_fields(fields, tied, rope_sections=sections, rope_interleaved=True), where)


def read_fields(fields: Fields, tied: bool, **options: Any) -> Text:
    """The fields of the decoder; `options` are those of `DecoderConfig`."""
    # heads that predict several tokens, and the dtype in which kernels of the authors keep the memory
    fields.skip("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")
    if not fields("attn_output_gate"):
        raise fields.unsupported("attn_output_gate", "attention has a gate here")
    if fields("mlp_only_layers"):
        raise fields.unsupported("mlp_only_layers")
    delta = DeltaConfig(
        fields("linear_num_key_heads"),
        fields("linear_num_value_heads"),
        fields("linear_key_head_dim"),
        fields("linear_value_head_dim"),
        fields("linear_conv_kernel_dim"),
    )
    if delta.num_value_heads % delta.num_key_heads:
        raise fields.unsupported("linear_num_value_heads", f"a multiple of {delta.num_key_heads} is needed")
    if fields("hidden_act") != "silu":
        raise fields.unsupported("hidden_act", "convolutions take silu alone")
    bias = fields("attention_bias")
    options |= {
        "qkv_bias": bias,
        "out_bias": bias,
        "qk_norm": True,
        "norm": "rms_centred",
        "attention_gate": True,
    }
    options |= {"rotary_dim": fields.rotary_channels(fields("head_dim"), TURNED)}
    layers = _delta_layers(fields)
    found = llama.common(fields, tied, delta_layers=layers, delta=delta if layers else None, **options)
    return replace(found, weights=weights)


def _delta_layers(fields: Fields) -> tuple[int, ...]:
    count, every, kinds = (fields(k) for k in ("num_hidden_layers", "full_attention_interval", "layer_types"))
    if kinds is None:
        kinds = ["full_attention" if k % every == every - 1 else "linear_attention" for k in range(count)]
    if len(kinds) != count or not {*kinds} <= {"full_attention", "linear_attention"}:
        raise fields.unsupported("layer_types", f"linear_attention or full_attention for {count} layers")
    return tuple(k for k, kind in enumerate(kinds) if kind == "linear_attention")


def weights(config: DecoderConfig, model: str, head: str) -> tuple[Weight, ...]:
    """See `mm_jax.families.llama.weights`."""
    table = []
    for weight in llama.weights(config, model, head):
        table += _gated(weight, config) if ".q_proj." in weight.name else [weight]

    def delta(layer: list[Weight], ours: str) -> list[Weight]:
        shared = [weight for weight in layer if not weight.path.startswith(f"{ours}attention/")]
        return shared + _delta_weights(config.delta, f"{model}layers.{{}}.linear_attn.", f"{ours}delta/")

    return llama.of_kinds(config, table, {"delta": delta})


def _gated(query: Weight, config: DecoderConfig) -> list[Weight]:
    """Queries and gates of attention: one tensor, those of a head side by side."""
    width, more = config.num_heads * config.head_dim, " i" * query.name.endswith("weight")
    sizes = (("n", config.num_heads), ("two", 2))
    return [
        replace(
            query,
            path=query.path.replace("/query/", f"/{name}/"),
            part=Part(k * width, (k + 1) * width, 2 * width, f"(n two h){more} -> (two n h){more}", sizes),
        )
        for k, name in enumerate(("query", "gate"))
    ]


def _delta_weights(c: DeltaConfig, theirs: str, ours: str) -> list[Weight]:
    table = [
        *linear(f"{theirs}in_proj_z", f"{ours}gate", bias=False),
        *linear(f"{theirs}in_proj_b", f"{ours}write", bias=False),
        *linear(f"{theirs}in_proj_a", f"{ours}step", bias=False),
        *linear(f"{theirs}out_proj", f"{ours}out", bias=False),
        Weight(f"{theirs}A_log", f"{ours}log_rate"),
        Weight(f"{theirs}dt_bias", f"{ours}step_bias"),
        Weight(f"{theirs}norm.weight", f"{ours}norm/scale"),
    ]
    start, total = 0, c.channels
    for name, width in c.widths.items():
        part = Part(start, start + width, total)
        table.append(Weight(f"{theirs}in_proj_qkv.weight", f"{ours}{name}/kernel", LINEAR, part=part))
        table.append(Weight(f"{theirs}conv1d.weight", f"{ours}{name}_conv", "c 1 k -> k c", part=part))
        start += width
    return table


def _text_system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    return replace(llama.text_system(text, values, names), unused=("mtp.*",))


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    found = qwen3_vl.system(text_in_space, values, names, MULTIMODAL, VISION)
    return replace(found, unused=("mtp.*",))


TEXT = Family("qwen3_5_text", ("text",), _text_system, llama.RENAMES)
FAMILY = Family("qwen3_5", ("text", "image", "video"), _system)
