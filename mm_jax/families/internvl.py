"""InternVL 2 to 3 (reference: InternVLForConditionalGeneration): InternViT, pixel shuffle with an MLP, and a decoder.

There are two kinds of files: those of transformers ("internvl"), and OpenGVLab's own ("internvl_chat"), which hold
the same numbers under other names, with query, key and value of the tower in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mm_jax.errors import UserError
from mm_jax.families import intern_vit
from mm_jax.families.clip import Output
from mm_jax.families.family import LINEAR, Family, System, Weight
from mm_jax.families.fields import Fields, token_ids
from mm_jax.families.parts import read_text
from mm_jax.models import MultimodalConfig, ProjectorConfig

DEFAULTS = {
    "text_config": {},
    "vision_config": {},
    "image_token_id": 151_667,
    "downsample_ratio": 0.5,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "pad_token_id": None,
}
RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
)
HEADS = ("language_model.lm_head.weight", "language_model.output.weight")
PROJECTOR_EPS = 1e-5  # torch's own


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    fields = Fields(values, DEFAULTS)
    fields.skip("image_seq_length")  # worked out from the picture's size
    if fields("vision_feature_select_strategy") != "default":
        raise fields.unsupported("vision_feature_select_strategy", "the class token has no place in the grid")
    output = _output(fields, "vision_feature_layer")
    vision = intern_vit.tower(fields("vision_config") or {}, output, "config.json: vision_config")
    text = read_text(fields("text_config") or {}, not names & set(HEADS), "qwen2")
    projector = ProjectorConfig(
        "mlp",
        _merge(fields),
        text.decoder.embed_dim,
        activation=fields.activation("projector_hidden_act"),
        norm_eps=PROJECTOR_EPS,
    )
    token, pad = fields("image_token_id"), fields("pad_token_id")
    fields.finish()
    table = (
        *intern_vit.weights(vision, "vision_tower.", "vision/"),
        *_projector("multi_modal_projector.", "layer_norm", "linear_1", "linear_2"),
        *text.table("language_model.model.", "language_model.lm_head."),
    )
    config = MultimodalConfig(vision, None, image_projector=projector, decoder=text.decoder)
    text = text if pad is None else replace(text, pad_id=pad)
    return System(config, table, text, intern_vit.unused("vision_tower."), token)


ORIGINAL_DEFAULTS = {
    "llm_config": {},
    "vision_config": {},
    "select_layer": -1,
    "force_image_size": None,
    "downsample_ratio": 0.5,
    "ps_version": "v1",
    "img_context_token_id": None,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "pad_token_id": None,
    "eos_token_id": None,
}
DECODERS = {
    "InternLM2ForCausalLM": "internlm2",
    "InternLM3ForCausalLM": "internlm3",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def _original_system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    fields = Fields(values, ORIGINAL_DEFAULTS)
    # what the picture rule and the prompt are made by, and the decoder's width, which its own config has
    fields.skip("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch", "pad2square")
    fields.skip("template", "system_message", "image_fold", "hidden_size")
    for name in ("use_backbone_lora", "use_llm_lora"):
        if fields(name):
            raise fields.unsupported(name, "merge the adapter into the weights")
    output = _output(fields, "select_layer")
    where = "config.json: vision_config"
    vision = intern_vit.original_tower(fields("vision_config"), output, where)
    size = fields("force_image_size")
    if size is not None and size != vision.height:
        # the reference would stretch the table of positions at each forward pass
        raise fields.unsupported("force_image_size", f"the tower's image_size is {vision.height}")
    llm = dict(fields("llm_config"))
    kinds = llm.get("architectures") or ["LlamaForCausalLM"]
    if kinds[0] not in DECODERS:
        raise UserError(f'config.json: the llm_config is of "{kinds[0]}", which is not supported')
    llm["model_type"] = DECODERS[kinds[0]]
    for name in (*intern_vit.GENERATION, "use_bfloat16", "moe_config"):
        llm.pop(name, None)
    text = read_text(llm, not names & set(HEADS), where="llm_config")
    version = fields("ps_version")
    if version not in ("v1", "v2"):
        raise fields.unsupported("ps_version", "known: v1, v2")
    projector = ProjectorConfig(
        "mlp",
        _merge(fields),
        text.decoder.embed_dim,
        activation="gelu",
        order="columns" if version == "v1" else "rows",
        norm_eps=PROJECTOR_EPS,
    )
    token, stops, pad = fields("img_context_token_id"), fields("eos_token_id"), fields("pad_token_id")
    fields.finish()
    table = (
        *intern_vit.original_weights(vision, "vision_model.", "vision/"),
        *_projector("mlp1.", "0", "1", "3"),
        *text.table("language_model.model.", "language_model.lm_head."),
    )
    config = MultimodalConfig(vision, None, image_projector=projector, decoder=text.decoder)
    text = replace(
        text, pad_id=text.pad_id if pad is None else pad, stop_ids=token_ids(stops) or text.stop_ids
    )
    return System(config, table, text, intern_vit.unused("vision_model."), token)


def _output(fields: Fields, name: str) -> Output:
    layer = fields(name)
    if not isinstance(layer, int):
        raise fields.unsupported(name, "one layer is needed")
    return Output(() if layer == -1 else (layer,), "drop")


def _merge(fields: Fields) -> tuple[int, int]:
    ratio = fields("downsample_ratio")
    side = int(1 / ratio)
    if side * ratio != 1:
        raise fields.unsupported("downsample_ratio", "one over a whole number is needed")
    return side, side


def _projector(theirs: str, norm: str, hidden: str, out: str) -> list[Weight]:
    table = [
        Weight(f"{theirs}{norm}.weight", "image_projector/norm/scale"),
        Weight(f"{theirs}{norm}.bias", "image_projector/norm/bias"),
    ]
    for name, path in ((hidden, "hidden"), (out, "out")):
        table.append(Weight(f"{theirs}{name}.weight", f"image_projector/{path}/kernel", LINEAR))
        table.append(Weight(f"{theirs}{name}.bias", f"image_projector/{path}/bias"))
    return table


FAMILY = Family("internvl", ("text", "image"), _system, RENAMES)
ORIGINAL = Family("internvl_chat", ("text", "image"), _original_system)
