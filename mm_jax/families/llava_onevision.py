"""LLaVA-OneVision (reference: LlavaOnevisionForConditionalGeneration): LLaVA-NeXT with SigLIP and Qwen2, a limit of
features, several pictures without tiles, and videos."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mm_jax.data.pixels import BICUBIC, CLIP_MEAN, CLIP_STD
from mm_jax.families.family import Family, System
from mm_jax.families.fields import Fields
from mm_jax.families.llava_next import DEFAULTS as NEXT
from mm_jax.families.llava_next import RENAMES, tiled

SIDES = range(384, 2305, 384)
DEFAULTS = NEXT | {
    "image_token_index": 151_646,
    "video_token_index": 151_647,
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": -1,
    "image_grid_pinpoints": [[height, width] for height in SIDES for width in SIDES],
    "vision_aspect_ratio": "anyres_max_9",
}
# the tower of the released checkpoints, whose config the reference's class knows by heart
TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
IMAGE_PROCESSOR = {
    "size": {"height": 384, "width": 384},
    "resample": BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    fields = Fields(values, DEFAULTS)
    ratio, video = fields("vision_aspect_ratio"), fields("video_token_index")
    if (most := re.fullmatch(r"anyres_max_(\d+)", ratio)) is None:
        raise fields.unsupported("vision_aspect_ratio", "known: anyres_max_ and a number")
    return tiled(
        fields, names, TOWER, "qwen2", IMAGE_PROCESSOR, most=int(most[1]), together=False, video_id=video
    )


FAMILY = Family("llava_onevision", ("text", "image", "video"), _system, RENAMES)
