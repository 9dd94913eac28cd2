"""PaliGemma 1 and 2 (reference: PaliGemmaForConditionalGeneration): SigLIP, a linear map, Gemma, a two-way prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mm_jax.data.box_text import BoxText
from mm_jax.data.image import Transform
from mm_jax.data.media_rule import FixedImage
from mm_jax.data.messages import Box, Part
from mm_jax.data.pixels import BICUBIC, HALF
from mm_jax.families.clip import Output, unused
from mm_jax.families.clip import weights as tower_weights
from mm_jax.families.family import LINEAR, Family, System, Weight
from mm_jax.families.fields import Fields
from mm_jax.families.llava import RENAMES
from mm_jax.families.parts import read_text
from mm_jax.families.siglip import tower
from mm_jax.families.template import PICTURES_FIRST
from mm_jax.families.template import TEXT as MESSAGE
from mm_jax.models import MultimodalConfig, ProjectorConfig

# of SiglipImageProcessor
IMAGE_PROCESSOR = {
    "size": {"height": 224, "width": 224},
    "resample": BICUBIC,
    "image_mean": HALF,
    "image_std": HALF,
}
DEFAULTS = {
    "image_token_index": 256_000,
    "projection_dim": 2048,
    "text_config": {},
    "vision_config": {},
}
# what the reference's class knows by heart
TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4096,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
TEXT = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 257_152,
}
# in the parts' configs: what follows from the picture's size and from the two-way prefix, and the activation of a
# projector that has none
IMPLIED = ("num_image_tokens", "use_bidirectional_attention", "projector_hidden_act")
# pictures, the token that begins a text, the question, a line break. The reference knows one question and its answer;
# what was said before stands in the prefix in the same way.
TEMPLATE = (
    PICTURES_FIRST
    + "{{ bos_token }}{% for message in messages %}"
    + MESSAGE
    + "{% if message['role'] == 'assistant' %}{% generation %}{{ text + eos_token }}{% endgeneration %}"
    "{% else %}{{ text + '\n' }}{% endif %}{% endfor %}"
)


LOCATION = r"<loc(?P<{}>\d{{4}})>"
BOXES = BoxText(
    "<loc{1:04d}><loc{0:04d}><loc{3:04d}><loc{2:04d}>",
    "".join(LOCATION.format(name) for name in ("y0", "x0", "y1", "x1")),
    scale=1024,
    largest=1023,
    opening=r"(<loc\d{4}>){1,3}$",
)


class LocatedImage(FixedImage):
    """Pictures of one size; boxes are tokens for their top, left, bottom and right in 1024ths of the picture."""

    kept = r"<loc\d{4}>"
    opening = BOXES.begun

    def write_box(self, box: Box, transform: Transform) -> str:
        return BOXES.write(box, transform)

    def parse(self, text: str, transforms: Sequence[Transform]) -> list[Part]:
        return BOXES.parse(text, transforms)


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    fields = Fields(values, DEFAULTS)
    fields.skip("vocab_size", "hidden_size")
    vision, text = (
        {k: v for k, v in (fields(name) or known).items() if k not in IMPLIED}
        for name, known in (("vision_config", TOWER), ("text_config", TEXT))
    )
    vision = tower(vision, Output(), "config.json: vision_config")
    text = read_text({"model_type": "gemma"} | text, "language_model.lm_head.weight" not in names)
    if fields("projection_dim") != text.decoder.embed_dim:
        raise fields.unsupported("projection_dim", f"the decoder's width {text.decoder.embed_dim} is needed")
    token = fields("image_token_index")
    fields.finish()
    projector = "multi_modal_projector.linear."
    table = (
        *tower_weights(vision, "vision_tower.", "vision/"),
        Weight(f"{projector}weight", "image_projector/out/kernel", LINEAR),
        Weight(f"{projector}bias", "image_projector/out/bias"),
        *text.table("language_model.model.", "language_model.lm_head."),
    )
    config = MultimodalConfig(
        vision,
        None,
        image_projector=ProjectorConfig("linear", norm=False),
        decoder=text.decoder,
        two_way="prefix",
    )
    rule = partial(
        LocatedImage,
        token_id=token,
        size=(vision.height, vision.width),
        num_tokens=config.image_tokens,
        defaults=IMAGE_PROCESSOR,
    )
    return System(config, table, text, unused("vision_tower."), rule=rule, template=TEMPLATE)


FAMILY = Family("paligemma", ("text", "image"), _system, RENAMES)
