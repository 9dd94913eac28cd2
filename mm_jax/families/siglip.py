"""The vision tower of SigLIP (reference: SiglipVisionModel): no class token, a norm at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mm_jax.errors import UserError
from mm_jax.families.clip import DEFAULTS as CLIP
from mm_jax.families.clip import RENAMES, Output, common, unused, weights, whole
from mm_jax.families.family import Family, System, Weight
from mm_jax.families.fields import Fields
from mm_jax.models import NativeViTConfig, ViTConfig

DEFAULTS = CLIP | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


def tower(values: Mapping[str, Any], output: Output, where: str) -> ViTConfig:
    """See `mm_jax.families.clip.tower`; the norm belongs to the tower's own output alone."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip("vision_use_head", "projection_dim", "vocab_size")
    if output.class_token == "drop":
        raise UserError(f'{where}: this tower has no class token, so the select strategy must be "full"')
    return common(fields, output, post_norm=not output.layers)


def native(fields: Fields, **options: Any) -> NativeViTConfig:
    """The tower over patches of pictures of any shape, and the end of its fields. options: what the fields do not say
    as they stand."""
    if fields("num_channels") != 3:
        raise fields.unsupported("num_channels")
    config = NativeViTConfig(
        **{
            "patch_size": fields.square("patch_size"),
            "frames": 1,
            "embed_dim": fields("hidden_size"),
            "num_layers": fields("num_hidden_layers"),
            "num_heads": fields("num_attention_heads"),
            "mlp_dim": fields("intermediate_size"),
            "activation": fields.activation("hidden_act"),
            "norm_eps": fields("layer_norm_eps"),
            "patch_bias": True,
            "rope_theta": 0.0,
            "post_norm": True,
            **options,
        }
    )
    fields.finish()
    return config


def native_weights(config: NativeViTConfig, theirs: str, ours: str, **patch: Any) -> tuple[Weight, ...]:
    """Those of `weights`, with changes to the one of the map of the patches, which is no convolution here."""
    table = weights(ViTConfig(patch_size=config.patch_size), theirs, ours)
    path = f"{ours}patch_embed/kernel"
    return tuple(replace(weight, **patch) if weight.path == path else weight for weight in table)


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    config = tower(values, Output(), "config.json")
    return System(config, weights(config), unused=unused())


FAMILY = Family("siglip_vision_model", ("image",), _system, RENAMES)
WHOLE = Family("siglip", ("image",), partial(whole, tower))
