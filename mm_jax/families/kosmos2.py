"""Kosmos-2 (reference: Kosmos2ForConditionalGeneration): a CLIP tower, latent queries, a decoder with sub-LN."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.data.grounding import GroundedImage
from mm_jax.families.blip_2 import linear, norm
from mm_jax.families.clip import DEFAULTS as CLIP
from mm_jax.families.clip import Output, common
from mm_jax.families.clip import weights as tower_weights
from mm_jax.families.family import LINEAR, Family, System, Text, Weight
from mm_jax.families.fields import Fields, token_ids
from mm_jax.families.llava import IMAGE_PROCESSOR
from mm_jax.models import DecoderConfig, MultimodalConfig, ProjectorConfig, ViTConfig

DEFAULTS = {"latent_query_num": 64, "text_config": {}, "vision_config": {}}
VISION = CLIP | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": 65_037,
    "max_position_embeddings": 2048,
    "embed_dim": 2048,
    "layers": 24,
    "ffn_dim": 8192,
    "attention_heads": 32,
    "activation_function": "gelu",
    "layer_norm_eps": 1e-5,
    "scale_embedding": True,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
# the text as it is: whoever wants boxes begins it with <grounding>
TEMPLATE = (
    "{{ bos_token }}{% set seen = namespace(space='') %}{% for message in messages %}"
    "{% for part in message['content'] %}{{ seen.space }}{% set seen.space = ' ' %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] }}{{ eos_token if loop.last }}{% endgeneration %}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endfor %}"
)


def tower(values: Mapping[str, Any], where: str) -> ViTConfig:
    """CLIP's tower with a norm behind it and the class token among the features."""
    options = {"class_token": "keep", "patch_bias": False, "pre_norm": True, "post_norm": True}
    return common(Fields(values, VISION, where), Output(), **options)


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`."""
    fields = Fields(values, TEXT, where)
    fields.skip("layerdrop", "init_std", "activation_dropout")  # of training
    width, heads, length = fields("embed_dim"), fields("attention_heads"), fields("max_position_embeddings")
    stops, pad = fields("eos_token_id"), fields("pad_token_id")
    config = DecoderConfig(
        vocab_size=fields("vocab_size"),
        embed_dim=width,
        num_layers=fields("layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=fields("ffn_dim"),
        activation=fields.activation("activation_function"),
        gated=False,
        tie_embeddings=tied,
        embed_scale=width**0.5 if fields("scale_embedding") else 1.0,
        positions="sines",
        num_positions=length + pad + 1,
        position_offset=pad + 1,
        norm="layer",
        norm_eps=fields("layer_norm_eps"),
        inner_norm=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )
    fields.finish()
    return Text(config, weights, length, token_ids(stops), pad)


def weights(config: DecoderConfig, model: str, head: str) -> tuple[Weight, ...]:
    """See `mm_jax.families.llama.weights`."""
    layer, ours = model + "layers.{}.", "decoder/layers/"
    table = [
        Weight(f"{model}embed_tokens.weight", "decoder/embedding/embedding"),
        *norm(f"{layer}self_attn_layer_norm", f"{ours}attention_norm"),
        *_attention(f"{layer}self_attn.", f"{ours}attention/"),
        *norm(f"{layer}self_attn.inner_attn_ln", f"{ours}attention/inner_norm"),
        *norm(f"{layer}final_layer_norm", f"{ours}mlp_norm"),
        *linear(f"{layer}ffn.fc1", f"{ours}mlp/up"),
        *linear(f"{layer}ffn.fc2", f"{ours}mlp/down"),
        *norm(f"{layer}ffn.ffn_layernorm", f"{ours}mlp/inner_norm"),
        *norm(f"{model}layer_norm", "decoder/norm"),
    ]
    if not config.tie_embeddings:
        table.append(Weight(f"{head}weight", "decoder/head/kernel", LINEAR))
    return tuple(table)


def _attention(theirs: str, ours: str) -> list[Weight]:
    names = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"))
    return [weight for one, two in names for weight in linear(theirs + one, ours + two)]


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    fields = Fields(values, DEFAULTS)
    vision = tower(fields("vision_config"), "config.json: vision_config")
    tied = "text_model.lm_head.weight" not in names
    found = text(fields("text_config"), tied, "config.json: text_config")
    projector = ProjectorConfig(
        "latent",
        num_queries=fields("latent_query_num"),
        num_heads=found.decoder.num_heads,
        scale=found.decoder.embed_scale,  # the reference scales what it has spliced
    )
    fields.finish()
    theirs, ours = "image_to_text_projection.", "image_projector/"
    table = (
        *tower_weights(vision, "vision_model.model.", "vision/"),
        *linear(f"{theirs}dense", f"{ours}input"),
        Weight(f"{theirs}latent_query", f"{ours}query"),
        *_attention(f"{theirs}x_attn.", f"{ours}attention/"),
        *found.table("text_model.model.", "text_model.lm_head."),
    )
    config = MultimodalConfig(vision, None, image_projector=projector, decoder=found.decoder)
    rule = partial(
        GroundedImage,
        token_id=found.decoder.vocab_size,  # the places of features have no token of their own
        size=(vision.height, vision.width),
        num_tokens=config.image_tokens,
        defaults=IMAGE_PROCESSOR,
    )
    return System(config, table, found, rule=rule, template=TEMPLATE)


FAMILY = Family("kosmos-2", ("text", "image"), _system)
