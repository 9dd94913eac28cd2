"""Qwen3-VL (reference: Qwen3VLForConditionalGeneration): a learned table of positions and DeepStack taps in the tower,
a Qwen3 decoder with interleaved M-RoPE; the frames of a video stand apart, each behind its time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.data.box_text import BoxText
from mm_jax.data.pixels import BICUBIC, HALF
from mm_jax.families.family import Family, System, Text, Weight
from mm_jax.families.fields import Fields
from mm_jax.families.llama import Reader, common
from mm_jax.families.qwen2_5_vl import JSON
from mm_jax.families.qwen2_vl import (
    DEFAULTS,
    WHERE,
    affine,
    merger,
    norm,
    read,
    rule,
    sectioned,
    tower,
    tower_weights,
)
from mm_jax.families.qwen2_vl import VISION as QWEN2_VL
from mm_jax.families.qwen3 import DEFAULTS as QWEN3
from mm_jax.models import MultimodalConfig

WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
TEXT = {name: value for name, value in QWEN3.items() if name not in WINDOWS} | {
    "num_hidden_layers": 32,
    "max_position_embeddings": 128_000,
    "rope_theta": 500_000.0,
}
VISION = {name: value for name, value in QWEN2_VL.items() if name not in ("embed_dim", "mlp_ratio")} | {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "patch_size": 16,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}

# of Qwen3VLVideoProcessor
VIDEO_PROCESSOR = {
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "resample": BICUBIC,
    "image_mean": HALF,
    "image_std": HALF,
    "do_sample_frames": True,
    "fps": 2,
    "min_frames": 4,
    "max_frames": 768,
}


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`."""
    return read_fields(Fields(values, TEXT, where), tied)


def read_fields(fields: Fields, tied: bool, **options: Any) -> Text:
    """The fields that all decoders of Qwen3-VL share; `options` are those of `DecoderConfig`.

    The axes take turns whatever `mrope_interleaved` says, as in the reference.
    """
    sections, _ = fields.rope_sections((24, 20, 20))
    bias = fields("attention_bias")
    options |= {"qkv_bias": bias, "out_bias": bias, "rope_sections": sections, "rope_interleaved": True}
    return sectioned(common(fields, tied, qk_norm=True, **options), fields.where)


def system(
    reader: Reader,
    values: Mapping[str, Any],
    names: frozenset[str],
    defaults: Mapping[str, Any] = DEFAULTS,
    tower_defaults: Mapping[str, Any] = VISION,
) -> System:
    """A Qwen3-VL around the decoder that `reader` reads."""
    fields, text_ = read(values, names, reader, defaults)
    vision = Fields(fields("vision_config"), tower_defaults, WHERE)
    side, taps = math.isqrt(vision("num_position_embeddings")), tuple(vision("deepstack_visual_indexes"))
    if side * side != vision("num_position_embeddings"):
        raise vision.unsupported("num_position_embeddings", "it must be a square")
    if list(taps) != sorted({*taps} & {*range(vision("depth"))}):
        raise vision.unsupported("deepstack_visual_indexes", "layers of the tower in order are needed")
    if len(taps) > text_.decoder.num_layers:
        raise vision.unsupported("deepstack_visual_indexes", "the decoder has fewer layers")
    out = vision("out_hidden_size")
    config = tower(
        vision,
        embed_dim=vision("hidden_size"),
        mlp_dim=vision("intermediate_size"),
        patch_bias=True,
        table_side=side,
        taps=taps,
    )
    theirs = "model.visual."
    table = [
        *tower_weights(config, theirs, {"linear_fc1": "up", "linear_fc2": "down"}),
        *norm(f"{theirs}merger.norm", "image_projector/norm"),
        *affine(f"{theirs}merger.linear_fc1", "image_projector/hidden"),
        *affine(f"{theirs}merger.linear_fc2", "image_projector/out"),
        *text_.table("model.language_model.", "lm_head."),
    ]
    table.append(Weight(f"{theirs}pos_embed.weight", "vision/positions"))
    width = text_.decoder.embed_dim
    deep = None
    if taps:
        deep = merger(config, out, width, norm_each=False)
        table += norm(f"{theirs}deepstack_merger_list.{{}}.norm", "deep_projector/norm")
        table += affine(f"{theirs}deepstack_merger_list.{{}}.linear_fc1", "deep_projector/hidden")
        table += affine(f"{theirs}deepstack_merger_list.{{}}.linear_fc2", "deep_projector/out")
    model = MultimodalConfig(
        config,
        None,
        image_projector=merger(config, out, width),
        decoder=text_.decoder,
        deep_projector=deep,
    )
    found = rule(model, fields, BoxText(**JSON), VIDEO_PROCESSOR, timed=True)
    fields.finish()
    return System(model, tuple(table), text_, rule=found)


FAMILY = Family("qwen3_vl", ("text", "image", "video"), partial(system, text))
