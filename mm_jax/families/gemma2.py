"""Gemma-2 (reference: Gemma2ForCausalLM): norms on both sides, capped logits, a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.families.family import Family, Text
from mm_jax.families.fields import Fields
from mm_jax.families.gemma import DEFAULTS as GEMMA
from mm_jax.families.gemma import options
from mm_jax.families.llama import RENAMES, common, text_system

DEFAULTS = GEMMA | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip("hidden_act", "cache_implementation")  # the reference reads hidden_activation
    return common(
        fields,
        tied,
        "hidden_activation",
        **options(fields),
        norm_place="both",
        windows=windows(fields, every=2),
        query_scale=fields("query_pre_attn_scalar") ** -0.5,
        attention_cap=fields("attn_logit_softcapping") or 0.0,
        logit_cap=fields("final_logit_softcapping") or 0.0,
    )


def windows(fields: Fields, every: int) -> tuple[int, ...]:
    """The window of each layer: of those that layer_types names, or else of all but the last of each `every` layers."""
    window, kinds = fields("sliding_window") or 0, fields("layer_types")
    if kinds is None:
        sliding = [bool((layer + 1) % every) for layer in range(fields("num_hidden_layers"))]
    elif set(kinds) <= {"full_attention", "sliding_attention"}:
        sliding = [kind == "sliding_attention" for kind in kinds]
    else:
        raise fields.unsupported("layer_types")
    if any(sliding) and not window:
        raise fields.unsupported("sliding_window", "there are sliding layers")
    return tuple(window if slides else 0 for slides in sliding)


FAMILY = Family("gemma2", ("text",), partial(text_system, text), RENAMES)
