"""Qwen2.5-VL (reference: Qwen2_5_VLForConditionalGeneration): Qwen2-VL with windows, RMS norms and a gated MLP in the
tower, and a time that is measured in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_jax.data.box_text import BoxText
from mm_jax.families.family import Family, System
from mm_jax.families.fields import Fields
from mm_jax.families.qwen2_vl import (
    RENAMES,
    WHERE,
    affine,
    merger,
    norm,
    read,
    rule,
    text,
    tower,
    tower_weights,
)
from mm_jax.families.qwen2_vl import VISION as QWEN2_VL
from mm_jax.models import MultimodalConfig

VISION = {name: value for name, value in QWEN2_VL.items() if name not in ("embed_dim", "mlp_ratio")} | {
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 4,
}

JSON = {
    "form": '"bbox_2d": [{0}, {1}, {2}, {3}]',
    "pattern": r'"bbox_2d":\s*\[\s*(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\s*\]',
    "opening": r'"bbox_2d[^\]]*$',
}
BOXES = BoxText(**JSON, scale=0)  # in pixels of the resized picture


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    fields, text_ = read(values, names, text)
    vision = Fields(fields("vision_config"), VISION, WHERE)
    # in pixels; the reference rounds down to whole tokens
    merge = vision("spatial_merge_size")
    window = vision("window_size") // merge // vision.square("patch_size") * merge
    if not window:
        raise vision.unsupported("window_size", "it must hold a token")
    out, per_second = vision("out_hidden_size"), vision("tokens_per_second")
    config = tower(
        vision,
        embed_dim=vision("hidden_size"),
        mlp_dim=vision("intermediate_size"),
        gated=True,
        norm="rms",
        window=window,
        full_layers=tuple(vision("fullatt_block_indexes")),
    )
    table = (
        *tower_weights(config, "visual.", {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}),
        *norm("visual.merger.ln_q", "image_projector/norm", bias=False),
        *affine("visual.merger.mlp.0", "image_projector/hidden"),
        *affine("visual.merger.mlp.2", "image_projector/out"),
        *text_.table("model.", "lm_head."),
    )
    projector = merger(config, out, text_.decoder.embed_dim, norm_kind="rms")
    model = MultimodalConfig(config, None, image_projector=projector, decoder=text_.decoder)
    found = rule(model, fields, BOXES, positions_per_second=float(per_second))
    fields.finish()
    return System(model, table, text_, rule=found)


FAMILY = Family("qwen2_5_vl", ("text", "image", "video"), _system, RENAMES)
