"""Llama-3.2-Vision (reference: MllamaForConditionalGeneration): a tower over the tiles of a picture, and Llama 3.1 with
gated layers between its own that read what the tower has seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mm_jax.data.media_rule import Settings
from mm_jax.data.tiled_rule import TiledRule, shapes
from mm_jax.errors import UserError
from mm_jax.families import llama
from mm_jax.families.family import LINEAR, Family, Names, System, Text, Weight, linear, norm
from mm_jax.families.fields import Fields
from mm_jax.models import DecoderConfig, MultimodalConfig, ProjectorConfig, TiledViTConfig, dummy_inputs

DEFAULTS = {"text_config": {}, "vision_config": {}, "image_token_index": 128_256}
TEXT = llama.DEFAULTS | {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    "eos_token_id": 128_001,
    "pad_token_id": 128_004,
}
VISION = {
    "hidden_size": 1280,
    "hidden_act": "gelu",
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "num_channels": 3,
    "intermediate_size": 5120,
    "vision_output_dim": 7680,
    "image_size": 448,
    "patch_size": 14,
    "norm_eps": 1e-5,
    "max_num_tiles": 4,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "supported_aspect_ratios": None,
}
EXTRA = 8  # rows of the embedding behind the vocabulary; the first is that of a picture
# the reference's class has this layout, and hub files the other
RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_model|multi_modal_projector)\.", r"\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`."""
    fields = Fields(values, TEXT, where)
    fields.skip("attention_bias", "mlp_bias", "head_dim")
    layers = tuple(sorted(fields("cross_attention_layers") or ()))
    if layers and not 0 <= layers[0] <= layers[-1] < fields("num_hidden_layers"):
        raise fields.unsupported("cross_attention_layers", f"there are {fields('num_hidden_layers')} layers")
    if tied:
        raise UserError(
            f"{where}: the embedding has rows of no word, so it cannot be the head; lm_head is needed"
        )
    found = llama.common(fields, False, cross_layers=layers, extra_tokens=EXTRA)
    return replace(found, weights=weights)


def weights(config: DecoderConfig, model: str, head: str) -> tuple[Weight, ...]:
    """Llama's tensors, and those of the layers for features."""
    table = llama.weights(config, model, head)
    return llama.of_kinds(config, table, {"cross": lambda _, ours: _cross_weights(model, ours)})


def _cross_weights(model: str, ours: str) -> list[Weight]:
    layer = f"{model}layers.{{}}."
    table = [
        Weight(f"{layer}input_layernorm.weight", f"{ours}attention_norm/scale"),
        Weight(f"{layer}post_attention_layernorm.weight", f"{ours}mlp_norm/scale"),
        Weight(f"{layer}cross_attn_attn_gate", f"{ours}attention_gate"),
        Weight(f"{layer}cross_attn_mlp_gate", f"{ours}mlp_gate"),
    ]
    for name, path in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
        table += linear(f"{layer}cross_attn.{name}_proj", f"{ours}attention/{path}", bias=False)
    for name, path in (("q", "query"), ("k", "key")):
        table.append(Weight(f"{layer}cross_attn.{name}_norm.weight", f"{ours}attention/{path}_norm/scale"))
    for name in ("gate", "up", "down"):
        table += linear(f"{layer}mlp.{name}_proj", f"{ours}mlp/{name}", bias=False)
    return table


def tower(values: Mapping[str, Any], where: str) -> TiledViTConfig:
    """Raises UserError for what is not supported."""
    fields = Fields(values, VISION, where)
    if fields("num_channels") != 3:
        raise fields.unsupported("num_channels")
    size, tiles = fields.square("image_size"), fields("max_num_tiles")
    grids = fields("supported_aspect_ratios")
    if grids is not None and [tuple(grid) for grid in grids] != shapes(tiles):
        raise fields.unsupported("supported_aspect_ratios", f"those of at most {tiles} tiles, in order, are")
    config = TiledViTConfig(
        height=size,
        width=size,
        patch_size=fields.square("patch_size"),
        tiles=tiles,
        shapes=len(shapes(tiles)),
        embed_dim=fields("hidden_size"),
        num_layers=fields("num_hidden_layers"),
        num_global_layers=fields("num_global_layers"),
        num_heads=fields("attention_heads"),
        mlp_dim=fields("intermediate_size"),
        activation=fields.activation("hidden_act"),
        norm_eps=fields("norm_eps"),
        taps=tuple(fields("intermediate_layers_indices") or ()),
    )
    if config.feature_dim != fields("vision_output_dim"):
        raise fields.unsupported(
            "vision_output_dim", f"the layers that are given out have {config.feature_dim}"
        )
    fields.finish()
    return config


def tower_weights(config: TiledViTConfig, theirs: str = "", ours: str = "") -> tuple[Weight, ...]:
    """The tensors of a tower whose names begin with `theirs` and whose paths begin with `ours`."""
    sides = (("p", config.patch_size), ("q", config.patch_size))
    tiles = (("t", config.tiles),)
    tables = (*tiles, ("p", config.num_positions))
    place = f"{theirs}gated_positional_embedding."
    table = [
        Weight(f"{theirs}patch_embedding.weight", f"{ours}patch_embed/kernel", "d c p q -> (p q c) d", sides),
        Weight(f"{theirs}class_embedding", f"{ours}class_token"),
        Weight(f"{place}embedding", f"{ours}positions"),
        Weight(f"{place}gate", f"{ours}positions_gate"),
        Weight(f"{place}tile_embedding.weight", f"{ours}tile_positions", "s (t p d) -> s t p d", tables),
        *norm(f"{theirs}layernorm_pre", f"{ours}pre_norm"),
        *norm(f"{theirs}layernorm_post", f"{ours}post_norm"),
    ]
    for name, path in (("pre", "before"), ("post", "after")):
        tile = f"{theirs}{name}_tile_positional_embedding."
        table.append(Weight(f"{tile}embedding.weight", f"{ours}{path}_tiles", "s (t d) -> s t d", tiles))
        table.append(Weight(f"{tile}gate", f"{ours}{path}_gate"))
    for name, path in (("transformer", "layers"), ("global_transformer", "global_layers")):
        layer, block = f"{theirs}{name}.layers.{{}}.", f"{ours}{path}/"
        table += [
            *norm(f"{layer}input_layernorm", f"{block}attention_norm"),
            *norm(f"{layer}post_attention_layernorm", f"{block}mlp_norm"),
            *linear(f"{layer}mlp.fc1", f"{block}mlp/up"),
            *linear(f"{layer}mlp.fc2", f"{block}mlp/down"),
        ]
        for part, map_ in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            table += linear(f"{layer}self_attn.{part}_proj", f"{block}attention/{map_}", bias=False)
        if path == "global_layers":
            table.append(Weight(f"{layer}gate_attn", f"{block}attention_gate"))
            table.append(Weight(f"{layer}gate_ffn", f"{block}mlp_gate"))
    return tuple(table)


def _system(values: Mapping[str, Any], names: Names) -> System:
    fields = Fields(values, DEFAULTS)
    tied = "language_model.lm_head.weight" not in names
    text_ = text(fields("text_config"), tied, "config.json: text_config")
    vision = tower(fields("vision_config"), "config.json: vision_config")
    token = fields("image_token_index")
    fields.finish()
    config = MultimodalConfig(
        vision, None, image_projector=ProjectorConfig("linear", norm=False), decoder=text_.decoder
    )
    table = (
        *tower_weights(vision, "vision_model.", "vision/"),
        Weight("multi_modal_projector.weight", "image_projector/out/kernel", LINEAR),
        Weight("multi_modal_projector.bias", "image_projector/out/bias"),
        *text_.table("language_model.model.", "language_model.lm_head."),
    )
    rule = partial(
        TiledRule,
        token_id=token,
        tiles=vision.tiles,
        size=(vision.height, vision.width),
        features=config.image_tokens,
    )
    return System(config, table, text_, rule=rule)


def _tower_inputs(config: TiledViTConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every picture of the reference's arrays [rows, pictures, ...], one after the other."""
    rule = TiledRule(
        Settings(),
        token_id=0,
        tiles=config.tiles,
        size=(config.height, config.width),
        features=config.feature_grid[0],
    )
    rows = rule.by_row(arrays, [0] * len(arrays["pixel_values"]))
    found = [item.arrays for row in rows for item in row]
    return {name: np.concatenate([one[name] for one in found]) for name in dummy_inputs(config)}


def _tower_system(values: Mapping[str, Any], names: Names) -> System:
    config = tower(values, "config.json")
    takes = TiledRule.names["image"][:3]
    return System(config, tower_weights(config), takes=takes, inputs=_tower_inputs)


TOWER = Family("mllama_vision_model", ("image",), _tower_system, ((r"^vision_model\.", ""),))
FAMILY = Family("mllama", ("text", "image"), _system, RENAMES)
