"""The vision tower of SigLIP2 for pictures in their own shape (NaFlex; reference: Siglip2VisionModel). Those of SigLIP2
for one size are of the family of SigLIP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mm_jax.data.naflex_rule import naflex_item, patches_of
from mm_jax.families import clip, siglip
from mm_jax.families.family import LINEAR, Family, Names, System, Weight
from mm_jax.families.fields import Fields
from mm_jax.families.media import patch_layout
from mm_jax.models import NativeViTConfig

DEFAULTS = {k: v for k, v in siglip.DEFAULTS.items() if k != "image_size"} | {"num_patches": 256}
TAKES = ("pixel_values", "spatial_shapes", "pixel_attention_mask")


def tower(values: Mapping[str, Any], where: str) -> NativeViTConfig:
    """Raises UserError for what is not supported."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip("vision_use_head")
    side = math.isqrt(fields("num_patches"))
    if side**2 != fields("num_patches"):
        raise fields.unsupported("num_patches", "a square is needed")
    return siglip.native(fields, merge=1, table_side=side, smooth_table=True)


def weights(config: NativeViTConfig, theirs: str = "", ours: str = "") -> tuple[Weight, ...]:
    """SigLIP's, but for the map of the patches, which is no convolution."""
    return siglip.native_weights(config, theirs, ours, pattern=LINEAR, sizes=())


def _inputs(config: NativeViTConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every picture of the reference's arrays in a row of its own."""
    found = patches_of(
        arrays["pixel_values"],
        arrays.get("pixel_attention_mask"),
        arrays.get("spatial_shapes", np.zeros((0, 2), int)),
        config.patch_dim,
    )
    made = [naflex_item(values, grid, patch_layout(config)).arrays for values, grid in found]
    room = arrays["pixel_values"].shape[1]

    def row(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, room - len(array))] + [(0, 0)] * (array.ndim - 1))

    return {name: np.stack([row(one[name]) for one in made]) for name in made[0]}


def _system(values: Mapping[str, Any], names: Names) -> System:
    config = tower(values, "config.json")
    return System(config, weights(config), unused=clip.unused(), takes=TAKES, inputs=_inputs)


def _whole(values: Mapping[str, Any], names: Names) -> System:
    """The tower of a checkpoint that has one of texts as well, which is left aside."""
    fields = Fields(values, {"vision_config": {}})
    fields.skip("text_config", "initializer_factor")
    config = tower(fields("vision_config"), "config.json: vision_config")
    fields.finish()
    unused = (*clip.unused("vision_model."), "text_model.*", "logit_scale", "logit_bias")
    return System(config, weights(config, "vision_model."), unused=unused, takes=TAKES, inputs=_inputs)


FAMILY = Family("siglip2_vision_model", ("image",), _system, clip.RENAMES)
WHOLE = Family("siglip2", ("image",), _whole)
