"""InternViT, the vision tower of InternVL (references: InternVLVisionModel, and OpenGVLab's InternVisionModel)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.families.clip import Output, common
from mm_jax.families.family import LINEAR, Family, Part, System, Weight
from mm_jax.families.fields import GENERATION, Fields
from mm_jax.models import ViTConfig

SHARED = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
}
DEFAULTS = SHARED | {
    "attention_bias": False,
    "use_qk_norm": False,
    "use_absolute_position_embeddings": True,
    "layer_scale_init_value": 0.1,
    "use_mean_pooling": True,
}
# of the original class, whose defaults are those of the tower with 6 billion parameters
ORIGINAL_DEFAULTS = SHARED | {
    "hidden_size": 3200,
    "intermediate_size": 12_800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
    "initializer_factor": 0.1,
}
NORMS = {"layer_norm": "layer", "rms_norm": "rms"}
RENAMES = ((r"^vision_(tower|model)\.", ""),)


def _norm(fields: Fields) -> str:
    kind = fields("norm_type")
    if kind not in NORMS:
        raise fields.unsupported("norm_type", "known: " + ", ".join(NORMS))
    return NORMS[kind]


def tower(values: Mapping[str, Any], output: Output, where: str) -> ViTConfig:
    """See `mm_jax.families.clip.tower`; without mean pooling a norm belongs to the tower's own output."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip("hidden_dropout_prob", "projection_dropout", "use_mask_token")
    qk_norm, eps = fields("use_qk_norm"), fields("layer_norm_eps")
    if qk_norm and eps != 1e-6:
        raise fields.unsupported("layer_norm_eps", "with use_qk_norm the reference has 1e-6 there")
    return common(
        fields,
        output,
        class_token=output.class_token,
        positions=fields("use_absolute_position_embeddings"),
        post_norm=not fields("use_mean_pooling") and not output.layers,
        norm=_norm(fields),
        qkv_bias=fields("attention_bias"),
        qk_norm=qk_norm,
        layer_scale=float(fields("layer_scale_init_value")),
    )


def original_tower(values: Mapping[str, Any], output: Output, where: str) -> ViTConfig:
    """The same tower with the field names of OpenGVLab's own checkpoints."""
    fields = Fields(values, ORIGINAL_DEFAULTS, where)
    # kernels, stochastic depth, settings of generation that old configs repeat for every part
    fields.skip("use_flash_attn", "drop_path_rate", "use_bfloat16", *GENERATION)
    if not values.get("use_moe"):
        fields.skip(*EXPERTS)
    return common(
        fields,
        output,
        class_token=output.class_token,
        post_norm=False,
        norm=_norm(fields),
        qkv_bias=fields("qkv_bias"),
        qk_norm=fields("qk_normalization"),
        layer_scale=float(fields("initializer_factor")),
    )


# what the configs of InternVL 3 say of experts that its tower does not have
EXPERTS = (
    "capacity_factor", "eval_capacity_factor", "laux_allreduce", "moe_coeff_ratio", "moe_intermediate_size",
    "moe_output_scale", "noisy_gate_policy", "num_experts", "num_routed_experts", "num_shared_experts",
    "shared_expert_intermediate_size", "use_residual", "use_rts", "use_weighted_residual",
)  # fmt: skip


def weights(config: ViTConfig, theirs: str = "", ours: str = "") -> tuple[Weight, ...]:
    """The tensors in the names of transformers."""
    layer, block = f"{theirs}encoder.layer.{{}}.", f"{ours}layers/"
    attention = []
    for name in ("query", "key", "value"):
        linear = f"{layer}attention.{name[0]}_proj."
        attention.append(Weight(f"{linear}weight", f"{block}attention/{name}/kernel", LINEAR))
        attention += [Weight(f"{linear}bias", f"{block}attention/{name}/bias")] * config.qkv_bias
    table = [
        *_embeddings(config, f"{theirs}embeddings.", ours, "cls_token", "patch_embeddings.projection"),
        *attention,
        *_linear(f"{layer}attention.projection_layer", f"{block}attention/out"),
        *_blocks(config, layer, block, "attention", ("layernorm_before", "layernorm_after"), "lambda_"),
    ]
    if config.positions:
        table.append(Weight(f"{theirs}embeddings.position_embeddings", f"{ours}positions", "1 n d -> n d"))
    if config.post_norm:
        table += _affine(f"{theirs}layernorm", f"{ours}norm", "layer")
    return tuple(table)


def original_weights(config: ViTConfig, theirs: str = "", ours: str = "") -> tuple[Weight, ...]:
    """The tensors in the names of OpenGVLab's own checkpoints."""
    layer, block, width = f"{theirs}encoder.layers.{{}}.", f"{ours}layers/", config.embed_dim
    attention = []
    for k, name in enumerate(("query", "key", "value")):
        part, path = Part(k * width, (k + 1) * width, 3 * width), f"{block}attention/{name}"
        attention.append(Weight(f"{layer}attn.qkv.weight", f"{path}/kernel", LINEAR, part=part))
        attention += [Weight(f"{layer}attn.qkv.bias", f"{path}/bias", part=part)] * config.qkv_bias
    return (
        *_embeddings(config, f"{theirs}embeddings.", ours, "class_embedding", "patch_embedding"),
        Weight(f"{theirs}embeddings.position_embedding", f"{ours}positions", "1 n d -> n d"),
        *attention,
        *_linear(f"{layer}attn.proj", f"{block}attention/out"),
        *_blocks(config, layer, block, "attn", ("norm1", "norm2"), "ls"),
    )


def _linear(theirs: str, ours: str) -> tuple[Weight, Weight]:
    return Weight(f"{theirs}.weight", f"{ours}/kernel", LINEAR), Weight(f"{theirs}.bias", f"{ours}/bias")


def _affine(theirs: str, ours: str, norm: str) -> list[Weight]:
    bias = [Weight(f"{theirs}.bias", f"{ours}/bias")] if norm == "layer" else []
    return [Weight(f"{theirs}.weight", f"{ours}/scale"), *bias]


def _embeddings(config: ViTConfig, theirs: str, ours: str, token: str, conv: str) -> tuple[Weight, ...]:
    sides = (("p", config.patch_size), ("q", config.patch_size))
    return (
        Weight(f"{theirs}{token}", f"{ours}class_token", "1 1 d -> d"),
        Weight(f"{theirs}{conv}.weight", f"{ours}patch_embed/kernel", "d c p q -> (p q c) d", sides),
        Weight(f"{theirs}{conv}.bias", f"{ours}patch_embed/bias"),
    )


def _blocks(
    config: ViTConfig, layer: str, block: str, attention: str, norms: tuple[str, str], scale: str
) -> list[Weight]:
    """What the two spellings call differently, but hold alike."""
    table = [
        *_affine(f"{layer}{norms[0]}", f"{block}attention_norm", config.norm),
        *_affine(f"{layer}{norms[1]}", f"{block}mlp_norm", config.norm),
        *_linear(f"{layer}mlp.fc1", f"{block}mlp/up"),
        *_linear(f"{layer}mlp.fc2", f"{block}mlp/down"),
        Weight(f"{layer}{scale}1", f"{block}attention_scale"),
        Weight(f"{layer}{scale}2", f"{block}mlp_scale"),
    ]
    if config.qk_norm:
        for side in ("query", "key"):
            name = f"{layer}{attention}.{side[0]}_norm.weight"
            table.append(Weight(name, f"{block}attention/{side}_norm/scale"))
    return table


def unused(theirs: str = "") -> tuple[str, ...]:
    """Patterns of what a system may leave aside: later blocks, the last norm, the token of masked patches."""
    names = ("encoder.layer.*", "encoder.layers.*", "layernorm.*", "embeddings.mask_token")
    return tuple(f"{theirs}{name}" for name in names)


def _system(read: Any, table: Any, values: Mapping[str, Any], names: frozenset[str]) -> System:
    config = read(values, Output(), "config.json")
    return System(config, table(config), unused=unused())


FAMILY = Family("internvl_vision", ("image",), partial(_system, tower, weights), RENAMES)
ORIGINAL = Family("intern_vit_6b", ("image",), partial(_system, original_tower, original_weights), RENAMES)
