"""DINOv2, with and without registers (reference: Dinov2Model, Dinov2WithRegistersModel)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mm_jax.errors import UserError
from mm_jax.families.clip import Output, hidden_layers
from mm_jax.families.family import Family, Part, System, Weight, linear, norm
from mm_jax.families.fields import Fields
from mm_jax.models import ViTConfig

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
    "num_register_tokens": 4,
}
RENAMES = (
    (r"^(dinov2|dinov2_with_registers)\.", ""),
    (r"\.attention\.([qkv])_proj\.", r".attention.attention.\1_proj."),
    (r"\.attention\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
# of a backbone's feature maps, masked training and dropout
OTHERS = """
    out_features out_indices _out_features _out_indices stage_names apply_layernorm reshape_hidden_states use_mask_token
    drop_path_rate hidden_dropout_prob attention_probs_dropout_prob
""".split()


def tower(values: Mapping[str, Any], output: Output, where: str) -> ViTConfig:
    """See `mm_jax.families.clip.tower`; the norm belongs to the tower's own output alone."""
    registers = values.get("model_type") == "dinov2_with_registers"
    fields = Fields(values, DEFAULTS, where)
    fields.skip(*OTHERS)
    if fields("num_channels") != 3:
        raise fields.unsupported("num_channels")
    size, patch, width = fields.square("image_size"), fields.square("patch_size"), fields("hidden_size")
    num_layers, feature_layers = hidden_layers(fields, output)
    gated, mlp = fields("use_swiglu_ffn"), int(width * fields("mlp_ratio"))
    activation = fields.activation("hidden_act")
    config = ViTConfig(
        height=size // patch * patch,
        width=size // patch * patch,
        patch_size=patch,
        embed_dim=width,
        num_layers=num_layers,
        num_heads=fields("num_attention_heads"),
        mlp_dim=(mlp * 2 // 3 + 7) // 8 * 8 if gated else mlp,
        activation="silu" if gated else activation,
        norm_eps=fields("layer_norm_eps"),
        class_token=output.class_token,
        post_norm=not output.layers,
        feature_layers=feature_layers,
        qkv_bias=fields("qkv_bias"),
        layer_scale=fields("layerscale_value"),
        position_grid=(size // patch,) * 2,
        smooth_positions=registers,  # a difference of the reference's two classes
        registers=fields("num_register_tokens") if registers else 0,
        gated=gated,
    )
    fields.finish()
    return config


def weights(config: ViTConfig, theirs: str = "", ours: str = "") -> tuple[Weight, ...]:
    """The tensors of a tower whose names begin with `theirs` and whose paths begin with `ours`."""
    layer, block, first = f"{theirs}encoder.layer.{{}}.", f"{ours}layers/", f"{theirs}embeddings."
    sides = (("p", config.patch_size), ("q", config.patch_size))
    patch, bias = f"{first}patch_embeddings.projection", config.qkv_bias
    table = [
        Weight(f"{first}cls_token", f"{ours}class_token", "1 1 d -> d"),
        Weight(f"{first}position_embeddings", f"{ours}positions", "1 n d -> n d"),
        *linear(patch, f"{ours}patch_embed", pattern="d c p q -> (p q c) d", sizes=sides),
        *norm(f"{layer}norm1", f"{block}attention_norm"),
        *linear(f"{layer}attention.attention.query", f"{block}attention/query", bias),
        *linear(f"{layer}attention.attention.key", f"{block}attention/key", bias),
        *linear(f"{layer}attention.attention.value", f"{block}attention/value", bias),
        *linear(f"{layer}attention.output.dense", f"{block}attention/out"),
        Weight(f"{layer}layer_scale1.lambda1", f"{block}attention_scale"),
        *norm(f"{layer}norm2", f"{block}mlp_norm"),
        Weight(f"{layer}layer_scale2.lambda1", f"{block}mlp_scale"),
    ]
    if config.registers:
        table.append(Weight(f"{first}register_tokens", f"{ours}registers", "1 r d -> r d"))
    if config.gated:
        size = config.mlp_dim
        for name, start in (("gate", 0), ("up", size)):
            part = Part(start, start + size, 2 * size)
            table.append(
                Weight(f"{layer}mlp.weights_in.weight", f"{block}mlp/{name}/kernel", "o i -> i o", part=part)
            )
            table.append(Weight(f"{layer}mlp.weights_in.bias", f"{block}mlp/{name}/bias", part=part))
        table += linear(f"{layer}mlp.weights_out", f"{block}mlp/down")
    else:
        table += linear(f"{layer}mlp.fc1", f"{block}mlp/up")
        table += linear(f"{layer}mlp.fc2", f"{block}mlp/down")
    if config.post_norm and not config.feature_layers:
        table += norm(f"{theirs}layernorm", f"{ours}norm")
    return tuple(table)


def unused(theirs: str = "") -> tuple[str, ...]:
    """Patterns of what a system may leave aside."""
    names = ("encoder.layer.*", "layernorm.*", "embeddings.mask_token", "classifier.*")
    return tuple(f"{theirs}{name}" for name in names)


def inputs(config: ViTConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """pixel_values [n, 3, H, W] of any size; pixels behind the last whole patch are left out, as in the reference."""
    pixels, patch = arrays["pixel_values"], config.patch_size
    if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[2:]) < patch:
        raise UserError(
            f"pixel_values has shape {list(pixels.shape)}, [pictures, 3, H, W] of at least {patch} x {patch} is needed"
        )
    height, width = (side // patch * patch for side in pixels.shape[2:])
    return {"pixel_values": np.ascontiguousarray(pixels[:, :, :height, :width].transpose(0, 2, 3, 1))}


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    config = tower(values, Output(), "config.json")
    return System(config, weights(config), unused=unused(), inputs=inputs)


FAMILY = Family("dinov2", ("image",), _system, RENAMES)
WITH_REGISTERS = Family("dinov2_with_registers", ("image",), _system, RENAMES)
