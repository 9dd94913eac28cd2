"""The vision tower of CLIP (reference: CLIPVisionModel), and the table of weights of towers shaped like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from mm_jax.families.family import LINEAR, Family, System, Weight
from mm_jax.families.fields import Fields
from mm_jax.models import ViTConfig

DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
RENAMES = ((r"^vision_model\.", ""),)


@dataclass(frozen=True)
class Output:
    """Which hidden states a system takes from a tower: () for the tower's own output, or numbers as of the reference's
    `hidden_states` (0 before the first block, -1 after the last); and what becomes of the class token."""

    layers: Sequence[int] = ()
    class_token: Literal["drop", "keep"] = "keep"


def tower(values: Mapping[str, Any], output: Output, where: str) -> ViTConfig:
    """The tower as far as the output needs it: blocks after the last one that is taken do not exist."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip("projection_dim", "vocab_size")
    options = {"class_token": output.class_token, "patch_bias": False, "pre_norm": True, "post_norm": False}
    return common(fields, output, **options)


def common(fields: Fields, output: Output, **options: Any) -> ViTConfig:
    """The fields that all towers of this shape share; `options` are those of `ViTConfig`."""
    if fields("num_channels") != 3:
        raise fields.unsupported("num_channels")
    size = fields.square("image_size")
    num_layers, feature_layers = hidden_layers(fields, output)
    config = ViTConfig(
        height=size,
        width=size,
        patch_size=fields.square("patch_size"),
        embed_dim=fields("hidden_size"),
        num_layers=num_layers,
        num_heads=fields("num_attention_heads"),
        mlp_dim=fields("intermediate_size"),
        activation=fields.activation("hidden_act"),
        norm_eps=fields("layer_norm_eps"),
        feature_layers=feature_layers,
        **options,
    )
    fields.finish()
    return config


def hidden_layers(fields: Fields, output: Output) -> tuple[int, tuple[int, ...]]:
    """The number of blocks that the output needs, and `ViTConfig.feature_layers`."""
    total = fields("num_hidden_layers")
    layers = [layer if layer >= 0 else total + 1 + layer for layer in output.layers] or [total]
    if not all(0 <= layer <= total for layer in layers):
        raise fields.unsupported("num_hidden_layers", f"hidden states {list(output.layers)} are asked for")
    last = max(*layers, 1)
    return last, () if layers == [last] else tuple(layers)


def weights(config: ViTConfig, theirs: str = "", ours: str = "") -> tuple[Weight, ...]:
    """The tensors of a tower whose names begin with `theirs` and whose paths begin with `ours`."""
    layer, block = f"{theirs}encoder.layers.{{}}.", f"{ours}layers/"

    def linear(name: str, path: str) -> tuple[Weight, Weight]:
        kernel = Weight(f"{layer}{name}.weight", f"{block}{path}/kernel", LINEAR)
        return kernel, Weight(f"{layer}{name}.bias", f"{block}{path}/bias")

    def norm(name: str, path: str) -> tuple[Weight, Weight]:
        return Weight(f"{name}.weight", f"{path}/scale"), Weight(f"{name}.bias", f"{path}/bias")

    sides = (("p", config.patch_size), ("q", config.patch_size))
    conv, patch = f"{theirs}embeddings.patch_embedding", f"{ours}patch_embed"
    table = [
        # a convolution of stride p over patches of p x p pixels is a linear map of their pixels
        Weight(f"{conv}.weight", f"{patch}/kernel", "d c p q -> (p q c) d", sides),
        Weight(f"{theirs}embeddings.position_embedding.weight", f"{ours}positions"),
        *norm(f"{layer}layer_norm1", f"{block}attention_norm"),
        *linear("self_attn.q_proj", "attention/query"),
        *linear("self_attn.k_proj", "attention/key"),
        *linear("self_attn.v_proj", "attention/value"),
        *linear("self_attn.out_proj", "attention/out"),
        *norm(f"{layer}layer_norm2", f"{block}mlp_norm"),
        *linear("mlp.fc1", "mlp/up"),
        *linear("mlp.fc2", "mlp/down"),
    ]
    if config.patch_bias:
        table.append(Weight(f"{conv}.bias", f"{patch}/bias"))
    if config.class_token != "none":
        table.append(Weight(f"{theirs}embeddings.class_embedding", f"{ours}class_token"))
    if config.pre_norm:
        table += norm(f"{theirs}pre_layrnorm", f"{ours}pre_norm")  # spelt so in the reference
    if config.post_norm and not config.feature_layers:
        table += norm(f"{theirs}post_layernorm", f"{ours}norm")
    return tuple(table)


def unused(theirs: str = "") -> tuple[str, ...]:
    """Patterns of what a system may leave aside: later blocks, the last norm, the pooling head."""
    return tuple(f"{theirs}{name}.*" for name in ("encoder.layers", "post_layernorm", "head"))


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    config = tower(values, Output(), "config.json")
    return System(config, weights(config), unused=unused())


def whole(read: Callable[..., ViTConfig], values: Mapping[str, Any], names: frozenset[str]) -> System:
    """The tower of a checkpoint that holds towers of pictures and of texts; that of texts is left aside."""
    fields = Fields(values, {"vision_config": {}})
    fields.skip("text_config", "projection_dim", "logit_scale_init_value", "initializer_factor")
    fields.skip("vision_config_dict", "text_config_dict")  # of old files, once more the same
    config = read(fields("vision_config"), Output(), "config.json: vision_config")
    fields.finish()
    table = weights(config, "vision_model.")
    others = ("text_model.*", "visual_projection.*", "text_projection.*", "logit_scale", "logit_bias")
    return System(config, table, unused=(*unused("vision_model."), *others))


FAMILY = Family("clip_vision_model", ("image",), _system, RENAMES)
WHOLE = Family("clip", ("image",), partial(whole, tower))
