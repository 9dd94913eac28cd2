"""The decoder of Gemma-3 (reference: Gemma3ForCausalLM): Gemma-2 with query/key norms in place of caps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.families.family import Family, Text
from mm_jax.families.fields import Fields
from mm_jax.families.gemma import options
from mm_jax.families.gemma2 import DEFAULTS as GEMMA2
from mm_jax.families.gemma2 import windows
from mm_jax.families.llama import RENAMES, common, text_system
from mm_jax.models import RopeScaling

DEFAULTS = GEMMA2 | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`."""
    fields = Fields(values, DEFAULTS, where)
    # the reference reads hidden_activation, and layer_types where they are written
    fields.skip("hidden_act", "cache_implementation", "_sliding_window_pattern")
    if fields("attn_logit_softcapping") is not None:
        raise fields.unsupported("attn_logit_softcapping", "the reference does not compute with it")
    theta, scaling, local = _rope(fields)
    return common(
        fields,
        tied,
        "hidden_activation",
        (theta, scaling),
        **options(fields),
        norm_place="both",
        qk_norm=True,
        windows=windows(fields, every=fields("sliding_window_pattern")),
        local_theta=local,
        query_scale=fields("query_pre_attn_scalar") ** -0.5,
        logit_cap=fields("final_logit_softcapping") or 0.0,
    )


def _rope(fields: Fields) -> tuple[float, RopeScaling | None, float]:
    """Base and scaling of full layers, and base of sliding ones, in the spelling of version 5 or in that of the hub."""
    kinds = fields("rope_parameters") or {}
    full = (
        {"rope_theta": fields("rope_theta")}
        | (fields("rope_scaling") or {})
        | (kinds.get("full_attention") or {})
    )
    sliding = kinds.get("sliding_attention") or {}
    other = set(kinds) - {"full_attention", "sliding_attention"}
    if other or sliding.get("rope_type", "default") != "default":
        raise fields.unsupported(
            "rope_parameters", "full_attention, and sliding_attention without scaling, are"
        )
    theta, scaling = Fields({"rope_parameters": full}, {}, fields.where).rope(
        fields("max_position_embeddings")
    )
    return theta, scaling, float(sliding.get("rope_theta", fields("rope_local_base_freq")))


FAMILY = Family("gemma3_text", ("text",), partial(text_system, text), RENAMES)
