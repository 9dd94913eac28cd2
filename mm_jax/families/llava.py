"""LLaVA-1.5 (reference: LlavaForConditionalGeneration): a tower, an MLP, and a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mm_jax.data.box_text import BoxText
from mm_jax.data.image import Transform
from mm_jax.data.media_rule import FixedImage
from mm_jax.data.messages import Box, Part
from mm_jax.data.pixels import BICUBIC, CLIP_MEAN, CLIP_STD
from mm_jax.families.clip import Output, unused
from mm_jax.families.clip import weights as tower_weights
from mm_jax.families.family import LINEAR, Family, System, Weight
from mm_jax.families.fields import Fields
from mm_jax.families.parts import read_text, read_tower
from mm_jax.models import MultimodalConfig, ProjectorConfig

DEFAULTS = {
    "image_token_index": 32_000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "pad_token_id": None,
    "text_config": {},
    "vision_config": {},
}
# the tower of the released checkpoints, whose config the reference's class knows by heart
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# of CLIPImageProcessor; LlavaImageProcessor differs in that it may pad to a square first
IMAGE_PROCESSOR = {
    "size": {"shortest_edge": 224},
    "resample": BICUBIC,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)
PLACE = r"([01]?\.\d+)"
# of the picture with its padding to a square, whatever the image processor makes of it
BOXES = BoxText(
    "[{0:.2f}, {1:.2f}, {2:.2f}, {3:.2f}]",
    r"\[" + ", ?".join([PLACE] * 4) + r"\]",
    scale=1,
    decimals=2,
    opening=r"\[[\d., ]*$",
)


def read(
    fields: Fields, names: frozenset[str], tower: Mapping[str, Any], decoder: str = "llama", **options: Any
) -> System:
    """What all of LLaVA's versions share, without the rule of their media.

    Args:
      tower: the vision config of a file that has none.
      decoder: the kind of a text config that names none.
      options: of `MultimodalConfig`.
    """
    # the number of tokens is worked out from the picture's size; the vocabulary is the text config's
    fields.skip("image_seq_length", "vocab_size")
    strategy, layers = fields("vision_feature_select_strategy"), fields("vision_feature_layer")
    if strategy not in ("default", "full"):
        raise fields.unsupported("vision_feature_select_strategy")
    output = Output(
        layers if isinstance(layers, list) else [layers], "drop" if strategy == "default" else "keep"
    )
    vision = read_tower(fields("vision_config") or tower, output, tower["model_type"])
    text = read_text(fields("text_config"), "language_model.lm_head.weight" not in names, decoder)
    bias = fields("multimodal_projector_bias")
    projector = ProjectorConfig(
        "mlp",
        hidden_dim=text.decoder.embed_dim,
        activation=fields.activation("projector_hidden_act"),
        norm=False,
        use_bias=bias,
    )
    pad = fields("pad_token_id")
    text = text if pad is None else replace(text, pad_id=pad)
    fields.finish()
    table = (
        *tower_weights(vision, "vision_tower.", "vision/"),
        *_projector_weights(bias),
        *text.table("language_model.model.", "language_model.lm_head."),
    )
    config = MultimodalConfig(vision, None, image_projector=projector, decoder=text.decoder, **options)
    return System(config, table, text, unused("vision_tower."))


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    fields = Fields(values, DEFAULTS)
    token = fields("image_token_index")
    system = read(fields, names, TOWER)
    rule = partial(
        SquareBoxes,
        token_id=token,
        size=(system.config.vision.height, system.config.vision.width),
        num_tokens=system.config.image_tokens,
        defaults=IMAGE_PROCESSOR,
    )
    return replace(system, rule=rule)


class SquareBoxes(FixedImage):
    """Boxes as four numbers from 0 to 1 of the picture with its padding to a square."""

    opening = BOXES.begun

    def transform(self, size: tuple[int, int]) -> Transform:
        side = max(size)
        return Transform(size, (1.0, 1.0), ((side - size[0]) // 2, (side - size[1]) // 2), (side, side))

    def write_box(self, box: Box, transform: Transform) -> str:
        return BOXES.write(box, transform)

    def parse(self, text: str, transforms: Sequence[Transform]) -> list[Part]:
        return BOXES.parse(text, transforms)


def _projector_weights(bias: bool) -> list[Weight]:
    table = []
    for name, path in (("linear_1", "hidden"), ("linear_2", "out")):
        theirs, ours = f"multi_modal_projector.{name}", f"image_projector/{path}"
        table.append(Weight(f"{theirs}.weight", f"{ours}/kernel", LINEAR))
        table += [Weight(f"{theirs}.bias", f"{ours}/bias")] * bias
    return table


FAMILY = Family("llava", ("text", "image"), _system, RENAMES)
