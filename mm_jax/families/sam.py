"""The vision encoder of Segment Anything (reference: SamVisionModel)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_jax.families.family import LINEAR, Family, Names, Part, System, Weight
from mm_jax.families.fields import Fields
from mm_jax.models import SamConfig

DEFAULTS = {
    "hidden_size": 768,
    "output_channels": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "mlp_ratio": 4.0,
    "mlp_dim": None,
    "use_abs_pos": True,
    "use_rel_pos": True,
    "window_size": 14,
    "global_attn_indexes": [2, 5, 8, 11],
}
RENAMES = ((r"^(?!vision_encoder\.)", "vision_encoder."),)


def tower(values: Mapping[str, Any], where: str) -> SamConfig:
    """Reads a vision config. Raises UserError for what is not supported."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip("num_pos_feats", "scale")  # of the prompt encoder
    if fields("num_channels") != 3:
        raise fields.unsupported("num_channels")
    width = fields("hidden_size")
    config = SamConfig(
        image_size=fields.square("image_size"),
        patch_size=fields.square("patch_size"),
        embed_dim=width,
        num_layers=fields("num_hidden_layers"),
        num_heads=fields("num_attention_heads"),
        mlp_dim=fields("mlp_dim") or int(width * fields("mlp_ratio")),
        out_dim=fields("output_channels"),
        activation=fields.activation("hidden_act"),
        norm_eps=fields("layer_norm_eps"),
        qkv_bias=fields("qkv_bias"),
        positions=fields("use_abs_pos"),
        relative=fields("use_rel_pos"),
        window=fields("window_size"),
        full_layers=tuple(fields("global_attn_indexes")),
    )
    fields.skip("mlp_ratio")
    fields.finish()
    return config


def weights(config: SamConfig, theirs: str = "", ours: str = "") -> tuple[Weight, ...]:
    """The tensors of an encoder whose names begin with `theirs` and whose paths begin with `ours`."""
    sides = (("p", config.patch_size), ("q", config.patch_size))
    patch = f"{theirs}patch_embed.projection."
    table = [
        Weight(f"{patch}weight", f"{ours}patch_embed/kernel", "d c p q -> (p q c) d", sides),
        Weight(f"{patch}bias", f"{ours}patch_embed/bias"),
        *neck(f"{theirs}neck.", f"{ours}neck/"),
    ]
    if config.positions:
        table.append(Weight(f"{theirs}pos_embed", f"{ours}positions", "1 h w d -> h w d"))
    for k in range(config.num_layers):
        table += _block(config, f"{theirs}layers.{k}.", f"{ours}layers_{k}/")
    return tuple(table)


def _block(config: SamConfig, theirs: str, ours: str) -> list[Weight]:
    width, maps = config.embed_dim, f"{ours}attention/maps/"
    table = []
    for k, name in enumerate(("query", "key", "value")):
        part = Part(k * width, (k + 1) * width, 3 * width)
        table.append(Weight(f"{theirs}attn.qkv.weight", f"{maps}{name}/kernel", LINEAR, part=part))
        table += [Weight(f"{theirs}attn.qkv.bias", f"{maps}{name}/bias", part=part)] * config.qkv_bias
    for name, path in (
        ("attn.proj", "attention/maps/out"),
        ("mlp.lin1", "mlp/up"),
        ("mlp.lin2", "mlp/down"),
    ):
        table.append(Weight(f"{theirs}{name}.weight", f"{ours}{path}/kernel", LINEAR))
        table.append(Weight(f"{theirs}{name}.bias", f"{ours}{path}/bias"))
    for name, path in (("layer_norm1", "attention_norm"), ("layer_norm2", "mlp_norm")):
        table += norm(f"{theirs}{name}", f"{ours}{path}")
    if config.relative:
        table.append(Weight(f"{theirs}attn.rel_pos_h", f"{ours}attention/relative_rows"))
        table.append(Weight(f"{theirs}attn.rel_pos_w", f"{ours}attention/relative_columns"))
    return table


def norm(theirs: str, ours: str) -> list[Weight]:
    """A layer norm."""
    return [Weight(f"{theirs}.weight", f"{ours}/scale"), Weight(f"{theirs}.bias", f"{ours}/bias")]


def neck(theirs: str, ours: str) -> list[Weight]:
    """The convolutions and norms of a neck."""
    return [
        Weight(f"{theirs}conv1.weight", f"{ours}conv1/kernel", "o i 1 1 -> i o"),
        *norm(f"{theirs}layer_norm1", f"{ours}norm1"),
        Weight(f"{theirs}conv2.weight", f"{ours}conv2/kernel", CONV),
        *norm(f"{theirs}layer_norm2", f"{ours}norm2"),
    ]


CONV = "o i h w -> h w i o"


def _system(values: Mapping[str, Any], names: Names) -> System:
    config = tower(values, "config.json")
    return System(config, weights(config, "vision_encoder."))


FAMILY = Family("sam_vision_model", ("image",), _system, RENAMES)
