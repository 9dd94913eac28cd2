"""InternLM2 and 2.5 (reference: InternLM's own InternLM2ForCausalLM): Llama with query, key and value in one map.

The rows of `wqkv` go by key/value head: for each the queries that read it, then its key, then its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mm_jax.families.family import LINEAR, Family, Part, System, Text, Weight
from mm_jax.families.fields import Fields
from mm_jax.families.llama import DEFAULTS as LLAMA
from mm_jax.families.llama import common
from mm_jax.models import DecoderConfig, MultimodalConfig

DEFAULTS = LLAMA | {"vocab_size": 103_168, "bias": True, "pad_token_id": 0}


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`. `bias` is about attention alone."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip("attn_implementation")
    bias = fields("bias")
    return replace(common(fields, tied, qkv_bias=bias, out_bias=bias), weights=weights)


def weights(config: DecoderConfig, model: str, head: str) -> tuple[Weight, ...]:
    """See `mm_jax.families.llama.weights`; here the head is called "output"."""
    layer, ours = model + "layers.{}.", "decoder/layers/"
    table = [
        Weight(f"{model}tok_embeddings.weight", "decoder/embedding/embedding"),
        Weight(f"{layer}attention_norm.weight", f"{ours}attention_norm/scale"),
        *fused(config, f"{layer}attention.wqkv", f"{ours}attention/", config.qkv_bias),
        Weight(f"{layer}attention.wo.weight", f"{ours}attention/out/kernel", LINEAR),
        Weight(f"{layer}ffn_norm.weight", f"{ours}mlp_norm/scale"),
        Weight(f"{layer}feed_forward.w1.weight", f"{ours}mlp/gate/kernel", LINEAR),
        Weight(f"{layer}feed_forward.w3.weight", f"{ours}mlp/up/kernel", LINEAR),
        Weight(f"{layer}feed_forward.w2.weight", f"{ours}mlp/down/kernel", LINEAR),
        Weight(f"{model}norm.weight", "decoder/norm/scale"),
    ]
    if config.out_bias:
        table.append(Weight(f"{layer}attention.wo.bias", f"{ours}attention/out/bias"))
    if not config.tie_embeddings:
        table.append(Weight(head.replace("lm_head", "output") + "weight", "decoder/head/kernel", LINEAR))
    return tuple(table)


def fused(config: DecoderConfig, theirs: str, ours: str, bias: bool) -> list[Weight]:
    """Query, key and value kernels, and biases if there are some, out of the one map `theirs`."""
    heads, size, groups = config.num_heads // config.num_kv_heads, config.head_dim, config.num_kv_heads
    ends = (0, heads * size, (heads + 1) * size, (heads + 2) * size)
    table = []
    for name, start, stop in zip(("query", "key", "value"), ends, ends[1:], strict=False):
        part = Part(start, stop, ends[-1], "(k d) i -> d k i", (("k", groups),))
        table.append(
            Weight(f"{theirs}.weight", f"{ours}{name}/kernel", "d k i -> i (k d)", (("k", groups),), part)
        )
        if bias:
            part = Part(start, stop, ends[-1], "(k d) -> d k", (("k", groups),))
            table.append(
                Weight(f"{theirs}.bias", f"{ours}{name}/bias", "d k -> (k d)", (("k", groups),), part)
            )
    return table


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    found = text(values, "output.weight" not in names, "config.json")
    return System(MultimodalConfig(None, None, decoder=found.decoder), found.table(), found)


FAMILY = Family("internlm2", ("text",), _system)
