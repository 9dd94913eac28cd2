"""Gemma-3 with pictures (reference: Gemma3ForConditionalGeneration): SigLIP, pooled soft tokens that see each other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.data.crop_rule import CropRule
from mm_jax.data.pixels import BILINEAR, HALF
from mm_jax.families.clip import Output, unused
from mm_jax.families.clip import weights as tower_weights
from mm_jax.families.family import Family, System, Weight
from mm_jax.families.fields import Fields
from mm_jax.families.gemma3_text import text
from mm_jax.families.llava import RENAMES
from mm_jax.families.siglip import tower
from mm_jax.models import MultimodalConfig, ProjectorConfig

# of Gemma3ImageProcessor
IMAGE_PROCESSOR = {
    "size": {"height": 224, "width": 224},
    "resample": BILINEAR,
    "image_mean": HALF,
    "image_std": HALF,
}
DEFAULTS = {
    "mm_tokens_per_image": 256,
    "image_token_index": 262_144,
    "text_config": {},
    "vision_config": {},
}
# of the released checkpoints; the reference's own default fits no number of tokens
TOWER = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
}
# of the instructed checkpoints
TEMPLATE = (
    "{{ bos_token }}{% set seen = namespace(system='') %}{% for message in messages %}"
    "{% set text %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endset %}"
    "{% if message['role'] == 'system' %}{% set seen.system = text + '\n\n' %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' + seen.system }}"
    "{{ text + '<end_of_turn>\n' }}{% set seen.system = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    fields = Fields(values, DEFAULTS)
    fields.skip("boi_token_index", "eoi_token_index", "vocab_size", "hidden_size")
    vision = tower(fields("vision_config") or TOWER, Output(), "config.json: vision_config")
    found = text(
        fields("text_config"), "language_model.lm_head.weight" not in names, "config.json: text_config"
    )
    if found.decoder.logit_cap:
        raise fields.unsupported(
            "text_config", "final_logit_softcapping is not used with pictures by the reference"
        )
    rows, side = vision.grid[0], int(fields("mm_tokens_per_image") ** 0.5)
    if rows % side:
        raise fields.unsupported("mm_tokens_per_image", f"a square whose side divides {rows} is needed")
    projector = ProjectorConfig(
        "linear",
        merge=(rows // side, rows // side),
        merge_by="mean",
        norm_kind="rms_centred",
        norm_eps=vision.norm_eps,
        use_bias=False,
    )
    token = fields("image_token_index")
    fields.finish()
    table = (
        *tower_weights(vision, "vision_tower.", "vision/"),
        Weight("multi_modal_projector.mm_soft_emb_norm.weight", "image_projector/norm/scale"),
        Weight("multi_modal_projector.mm_input_projection_weight", "image_projector/out/kernel"),
        *found.table("language_model.model.", "language_model.lm_head."),
    )
    config = MultimodalConfig(vision, None, image_projector=projector, decoder=found.decoder, two_way="media")
    rule = partial(
        CropRule,
        token_id=token,
        size=(vision.height, vision.width),
        num_tokens=config.image_tokens,
        defaults=IMAGE_PROCESSOR,
    )
    return System(config, table, found, unused("vision_tower."), rule=rule, template=TEMPLATE)


FAMILY = Family("gemma3", ("text", "image"), _system, RENAMES)
