"""Qwen2-VL (reference: Qwen2VLForConditionalGeneration): a native-resolution tower, a merger, and a Qwen2 decoder with
M-RoPE; and what the later Qwen-VL families share with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mm_jax.data.box_text import BoxText
from mm_jax.data.media_rule import MediaRule, Settings
from mm_jax.data.native_rule import NativeRule
from mm_jax.data.patches import PatchLayout
from mm_jax.data.pixels import BICUBIC, CLIP_MEAN, CLIP_STD
from mm_jax.errors import UserError
from mm_jax.families.family import LINEAR, Family, Part, System, Text, Weight
from mm_jax.families.fields import Fields
from mm_jax.families.llama import common
from mm_jax.families.qwen2 import DEFAULTS as QWEN2
from mm_jax.families.qwen2 import windows
from mm_jax.models import MultimodalConfig, NativeViTConfig, ProjectorConfig

DEFAULTS = {
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_config": {},
}
TEXT = QWEN2 | {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1_000_000.0,
    "eos_token_id": 151_645,
}
VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "rope_parameters": {},
}
# of Qwen2VLImageProcessor; Qwen3-VL uses it too
IMAGE_PROCESSOR = {
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "resample": BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
# of Qwen2VLVideoProcessor
VIDEO_PROCESSOR = IMAGE_PROCESSOR | {
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
    "do_sample_frames": False,
    "min_frames": 4,
    "max_frames": 768,
}
BOXES = BoxText(
    "<|box_start|>({0},{1}),({2},{3})<|box_end|>",
    r"(?:<\|box_start\|>)?\((\d+),(\d+)\),\((\d+),(\d+)\)(?:<\|box_end\|>)?",
    opening=r"\(\d*,?\d*\)?,?(\(\d*,?\d*)?$",
)
RENAMES = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
WHERE = "config.json: vision_config"


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`."""
    fields = Fields(values, TEXT, where)
    sections, interleaved = fields.rope_sections((16, 24, 24))
    options = {"rope_sections": sections, "rope_interleaved": interleaved, "windows": windows(fields)}
    return sectioned(common(fields, tied, qkv_bias=True, **options), where)


def sectioned(text: Text, where: str) -> Text:
    """The text, after a look at its M-RoPE sections."""
    sections, channels = text.decoder.rope_sections, text.decoder.rotary_dim or text.decoder.head_dim
    if len(sections) != 3 or sum(sections) != channels // 2:
        raise UserError(
            f"{where}: mrope_section is {list(sections)}; three numbers that add up to half of the {channels} channels "
            "that are turned are needed"
        )
    return text


def tower(fields: Fields, **options: Any) -> NativeViTConfig:
    """The fields that all towers of these families share; `options` are those of `NativeViTConfig`."""
    fields.skip("in_chans", "spatial_patch_size")  # hub files; the reference's class ignores them
    if fields("in_channels") != 3:
        raise fields.unsupported("in_channels")
    rope = Fields(
        fields("rope_parameters") or {}, {"rope_theta": 10_000.0, "rope_type": "axial"}, fields.where
    )
    if rope("rope_type") not in ("axial", "default"):
        raise rope.unsupported("rope_type")
    config = NativeViTConfig(
        patch_size=fields.square("patch_size"),
        frames=fields.square("temporal_patch_size"),
        merge=fields("spatial_merge_size"),
        num_layers=fields("depth"),
        num_heads=fields("num_heads"),
        activation=fields.activation("hidden_act"),
        rope_theta=float(rope("rope_theta")),
        **options,
    )
    rope.finish()
    fields.finish()
    if config.embed_dim % (4 * config.num_heads):
        raise UserError(
            f"{fields.where}: {config.num_heads} heads of {config.embed_dim} channels cannot turn rows and columns"
        )
    return config


def merger(config: NativeViTConfig, width: int, decoder_width: int, **options: Any) -> ProjectorConfig:
    """The projector: merge x merge neighbours, which stand next to each other, through an MLP."""
    if width != decoder_width:
        raise UserError(f"{WHERE}: features are {width} wide, the decoder {decoder_width}")
    merge = config.merge**2
    options = {"norm_each": True, "activation": "gelu"} | options
    return ProjectorConfig("mlp", merge=(merge, 1), hidden_dim=merge * config.embed_dim, **options)


def rule(
    config: MultimodalConfig,
    fields: Fields,
    boxes: BoxText,
    video_defaults: Mapping[str, Any] = VIDEO_PROCESSOR,
    **options: Any,
) -> Callable[[Settings], MediaRule]:
    """How pictures and videos become patches and tokens; `options` are those of `NativeRule`."""
    vision = config.vision
    return partial(
        NativeRule,
        tokens={"image": fields("image_token_id"), "video": fields("video_token_id")},
        layout=PatchLayout(vision.merge, vision.window, vision.table_side),
        patch=vision.patch_size,
        frames=vision.frames,
        axes=True,
        defaults=IMAGE_PROCESSOR,
        video_defaults=video_defaults,
        boxes=boxes,
        **options,
    )


def affine(name: str, path: str, bias: bool = True) -> list[Weight]:
    """A linear map."""
    return [Weight(f"{name}.weight", f"{path}/kernel", LINEAR)] + [
        Weight(f"{name}.bias", f"{path}/bias")
    ] * bias


def norm(name: str, path: str, bias: bool = True) -> list[Weight]:
    """A layer norm, or without bias an RMS norm."""
    return [Weight(f"{name}.weight", f"{path}/scale")] + [Weight(f"{name}.bias", f"{path}/bias")] * bias


def tower_weights(config: NativeViTConfig, theirs: str, mlp: Mapping[str, str]) -> list[Weight]:
    """The tensors of a tower; `mlp` is their name of each map in its MLP -> ours."""
    layer, block, biased = f"{theirs}blocks.{{}}.", "vision/layers/", config.norm == "layer"
    sides = (("t", config.frames), ("p", config.patch_size), ("q", config.patch_size))
    conv = f"{theirs}patch_embed.proj"
    table = [
        # a convolution of its own size as stride is a linear map of the pixels
        Weight(f"{conv}.weight", "vision/patch_embed/kernel", "d c t p q -> (c t p q) d", sides),
        *norm(f"{layer}norm1", f"{block}attention_norm", biased),
        *affine(f"{layer}attn.proj", f"{block}attention/out"),
        *norm(f"{layer}norm2", f"{block}mlp_norm", biased),
    ]
    if config.patch_bias:
        table.append(Weight(f"{conv}.bias", "vision/patch_embed/bias"))
    width = config.embed_dim
    for k, name in enumerate(("query", "key", "value")):
        part, path = Part(k * width, (k + 1) * width, 3 * width), f"{block}attention/{name}"
        table.append(Weight(f"{layer}attn.qkv.weight", f"{path}/kernel", LINEAR, part=part))
        table.append(Weight(f"{layer}attn.qkv.bias", f"{path}/bias", part=part))
    for name, path in mlp.items():
        table += affine(f"{layer}mlp.{name}", f"{block}mlp/{path}")
    return table


def read(
    values: Mapping[str, Any],
    names: frozenset[str],
    reader: Callable[[Mapping[str, Any], bool, str], Text],
    defaults: Mapping[str, Any] = DEFAULTS,
) -> tuple[Fields, Text]:
    """The fields of the whole and the text config, which old files have in one object."""
    tied = "lm_head.weight" not in names
    fields = Fields(values, defaults)
    fields.skip("vision_start_token_id", "vision_end_token_id", "vision_token_id")  # of the processor
    if fields.values.get("text_config"):
        fields.skip("text_config")
        return fields, reader(values["text_config"], tied, "config.json: text_config")
    of_text = {*TEXT, "rope_scaling", "rope_parameters"} - {*defaults}
    fields.skip(*of_text)
    return fields, reader({k: v for k, v in values.items() if k in of_text}, tied, "config.json")


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    fields, text_ = read(values, names, text)
    vision = Fields(fields("vision_config"), VISION, WHERE)
    width, out = vision("embed_dim"), vision("hidden_size")
    config = tower(vision, embed_dim=width, mlp_dim=int(width * vision("mlp_ratio")))
    table = (
        *tower_weights(config, "visual.", {"fc1": "up", "fc2": "down"}),
        *norm("visual.merger.ln_q", "image_projector/norm"),
        *affine("visual.merger.mlp.0", "image_projector/hidden"),
        *affine("visual.merger.mlp.2", "image_projector/out"),
        *text_.table("model.", "lm_head."),
    )
    projector = merger(config, out, text_.decoder.embed_dim)
    model = MultimodalConfig(config, None, image_projector=projector, decoder=text_.decoder)
    found = rule(model, fields, BOXES)
    fields.finish()
    return System(model, table, text_, rule=found)


FAMILY = Family("qwen2_vl", ("text", "image", "video"), _system, RENAMES)
