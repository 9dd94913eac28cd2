"""The vision tower of SigLIP (reference: SiglipVisionModel): no class token, a norm at the end."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.errors import UserError
from mm_jax.families.clip import DEFAULTS as CLIP
from mm_jax.families.clip import RENAMES, Output, common, unused, weights, whole
from mm_jax.families.family import Family, System
from mm_jax.families.fields import Fields
from mm_jax.models import ViTConfig

DEFAULTS = CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


def tower(values: Mapping[str, Any], output: Output, where: str) -> ViTConfig:
    """See `mm_jax.families.clip.tower`; the norm belongs to the tower's own output alone."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip("vision_use_head", "projection_dim", "vocab_size")
    if output.class_token == "drop":
        raise UserError(f'{where}: this tower has no class token, so the select strategy must be "full"')
    return common(fields, output, post_norm=not output.layers)


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    config = tower(values, Output(), "config.json")
    return System(config, weights(config), unused=unused())


FAMILY = Family("siglip_vision_model", ("image",), _system, RENAMES)
WHOLE = Family("siglip", ("image",), partial(whole, tower))
