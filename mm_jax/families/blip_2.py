"""BLIP-2 (reference: Blip2ForConditionalGeneration): EVA's ViT, a Q-Former and a decoder; and the tower alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.data.instructed_rule import InstructedImage
from mm_jax.data.media_rule import FixedImage
from mm_jax.data.pixels import BICUBIC, CLIP_MEAN, CLIP_STD
from mm_jax.errors import UserError
from mm_jax.families.clip import Output, common
from mm_jax.families.family import LINEAR, Family, Part, System, Weight
from mm_jax.families.fields import Fields
from mm_jax.families.parts import read_text
from mm_jax.families.template import PICTURES_FIRST, TEXT
from mm_jax.models import MultimodalConfig, ProjectorConfig, ViTConfig

DEFAULTS = {
    "num_query_tokens": 32,
    "image_token_index": None,
    "text_config": {},
    "vision_config": {},
    "qformer_config": {},
}
VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
QFORMER = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 1408,
    "position_embedding_type": "absolute",
}
# of BlipImageProcessor
IMAGE_PROCESSOR = {
    "size": {"height": 384, "width": 384},
    "resample": BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
# text branch of the Q-Former: of the retrieval model, generation does not use it
UNUSED = (
    "qformer.embeddings.*",
    "qformer.encoder.layer.*.intermediate.*",
    "qformer.encoder.layer.*.output.*",
)


class QueriesFirst(FixedImage):
    """Pictures stand before the token that begins a text, which is tokenised without them."""

    pieces = "every"
    placeholders = {"image": "<image>"}


# as in LAVIS, the authors' code: questions and answers, or a picture alone, which is to be described
TEMPLATE = (
    PICTURES_FIRST
    + "{% set seen = namespace(space='') %}{% for message in messages %}"
    + TEXT
    + "{% if text and message['role'] == 'user' %}{{ seen.space + 'Question: ' + text + ' Answer:' }}"
    "{% elif text and message['role'] == 'assistant' %}"
    "{{ seen.space }}{% generation %}{{ text + ('\n' if loop.last else '.') }}{% endgeneration %}"
    "{% elif text %}{{ seen.space + text }}{% endif %}{% if text %}{% set seen.space = ' ' %}{% endif %}{% endfor %}"
)
# instructions as they are; only the last answer has an end, for the Q-Former's vocabulary does not know it
INSTRUCTED_TEMPLATE = (
    PICTURES_FIRST
    + "{% for message in messages %}"
    + TEXT
    + "{% if message['role'] == 'assistant' %}{{ ' ' }}"
    "{% generation %}{{ text + (eos_token if loop.last else '') }}{% endgeneration %}"
    "{% else %}{{ text if loop.first else '\n' + text }}{% endif %}{% endfor %}"
)


def tower(values: Mapping[str, Any], output: Output, where: str) -> ViTConfig:
    """See `mm_jax.families.clip.tower`; a norm belongs to the tower's own output."""
    fields = Fields(values, VISION, where)
    fields.skip("projection_dim")
    return common(
        fields,
        output,
        class_token=output.class_token,
        post_norm=not output.layers,
        qkv_bias=fields("qkv_bias"),
    )


def tower_weights(config: ViTConfig, theirs: str = "", ours: str = "") -> tuple[Weight, ...]:
    """See `mm_jax.families.clip.weights`; query, key and value are one tensor."""
    layer, block = f"{theirs}encoder.layers.{{}}.", f"{ours}layers/"
    width = config.embed_dim
    attention = []
    for k, name in enumerate(("query", "key", "value")):
        part = Part(k * width, (k + 1) * width, 3 * width)
        path = f"{block}attention/{name}"
        attention.append(Weight(f"{layer}self_attn.qkv.weight", f"{path}/kernel", LINEAR, part=part))
        attention += [Weight(f"{layer}self_attn.qkv.bias", f"{path}/bias", part=part)] * config.qkv_bias
    sides = (("p", config.patch_size), ("q", config.patch_size))
    conv = f"{theirs}embeddings.patch_embedding"
    table = [
        Weight(f"{theirs}embeddings.class_embedding", f"{ours}class_token", "1 1 d -> d"),
        Weight(f"{theirs}embeddings.position_embedding", f"{ours}positions", "1 n d -> n d"),
        Weight(f"{conv}.weight", f"{ours}patch_embed/kernel", "d c p q -> (p q c) d", sides),
        Weight(f"{conv}.bias", f"{ours}patch_embed/bias"),
        *norm(f"{layer}layer_norm1", f"{block}attention_norm"),
        *attention,
        *linear(f"{layer}self_attn.projection", f"{block}attention/out"),
        *norm(f"{layer}layer_norm2", f"{block}mlp_norm"),
        *linear(f"{layer}mlp.fc1", f"{block}mlp/up"),
        *linear(f"{layer}mlp.fc2", f"{block}mlp/down"),
    ]
    if config.post_norm:
        table += norm(f"{theirs}post_layernorm", f"{ours}norm")
    return tuple(table)


def norm(theirs: str, ours: str, **layers: int) -> tuple[Weight, Weight]:
    """Factors and biases of a layer norm."""
    return Weight(f"{theirs}.weight", f"{ours}/scale", **layers), Weight(
        f"{theirs}.bias", f"{ours}/bias", **layers
    )


def linear(theirs: str, ours: str, **layers: int) -> tuple[Weight, Weight]:
    """Matrix and biases of a linear map."""
    kernel = Weight(f"{theirs}.weight", f"{ours}/kernel", LINEAR, **layers)
    return kernel, Weight(f"{theirs}.bias", f"{ours}/bias", **layers)


def qformer(values: Mapping[str, Any], num_queries: int, vision: ViTConfig, text: bool) -> ProjectorConfig:
    """Reads a qformer_config; text: whether it is given an instruction."""
    fields = Fields(values, QFORMER, "config.json: qformer_config")
    fields.skip(
        "hidden_dropout_prob", "attention_probs_dropout_prob", "use_qformer_text_input", "classifier_dropout"
    )
    fields.skip("encoder_hidden_size")  # the reference takes that of the tower
    layers, every = fields("num_hidden_layers"), fields("cross_attention_frequency")
    if layers % every:
        raise fields.unsupported("num_hidden_layers", "a multiple of cross_attention_frequency is needed")
    if fields("position_embedding_type") != "absolute":
        raise fields.unsupported("position_embedding_type")
    vocab, length = fields("vocab_size"), fields("max_position_embeddings")
    config = ProjectorConfig(
        "qformer",
        hidden_dim=fields("hidden_size"),
        num_queries=num_queries,
        num_heads=fields("num_attention_heads"),
        num_layers=layers,
        mlp_dim=fields("intermediate_size"),
        cross_every=every,
        text_vocab=vocab if text else 0,
        text_length=length if text else 0,
        activation=fields.activation("hidden_act"),
        norm_eps=fields("layer_norm_eps"),
    )
    fields.finish()
    return config


def qformer_weights(config: ProjectorConfig) -> tuple[Weight, ...]:
    """Queries, Q-Former and the linear map behind it."""
    embeddings = "qformer.embeddings." if config.text_vocab else "qformer."
    ours = "image_projector/"
    table = [
        Weight("query_tokens", f"{ours}query", "1 q d -> q d"),
        *norm(f"{embeddings}layernorm", f"{ours}input_norm"),
        *linear("language_projection", f"{ours}out"),
    ]
    if config.text_vocab:
        table += [
            Weight(f"{embeddings}word_embeddings.weight", f"{ours}text_embedding/embedding"),
            Weight(f"{embeddings}position_embeddings.weight", f"{ours}text_positions/embedding"),
        ]
    layer = "qformer.encoder.layer.{}."
    for k in range(config.cross_every):
        block, layers = f"{ours}layers/layer{k}/", {"first": k, "step": config.cross_every}
        attentions = [("attention", "attention"), ("crossattention", "cross_attention")]
        for theirs, name in attentions[: 2 - bool(k)]:
            for part in ("query", "key", "value"):
                table += linear(f"{layer}{theirs}.attention.{part}", f"{block}{name}/{part}", **layers)
            table += linear(f"{layer}{theirs}.output.dense", f"{block}{name}/out", **layers)
            table += norm(f"{layer}{theirs}.output.LayerNorm", f"{block}{name}_norm", **layers)
        for theirs, name in [("_query", "mlp"), ("", "text_mlp")][: 1 + bool(config.text_vocab)]:
            table += linear(f"{layer}intermediate{theirs}.dense", f"{block}{name}/up", **layers)
            table += linear(f"{layer}output{theirs}.dense", f"{block}{name}/down", **layers)
            table += norm(f"{layer}output{theirs}.LayerNorm", f"{block}{name}_norm", **layers)
    return tuple(table)


def system(values: Mapping[str, Any], names: frozenset[str], instructed: bool) -> System:
    """BLIP-2, or InstructBLIP where the Q-Former is given an instruction."""
    fields = Fields(values, DEFAULTS)
    fields.skip("use_decoder_only_language_model", "image_text_hidden_size")
    vision = tower(fields("vision_config"), Output(), "config.json: vision_config")
    described = {"model_type": "opt"} | fields("text_config")
    if described.get("is_encoder_decoder") or described["model_type"] == "t5":
        kind = described["model_type"]
        raise UserError(
            f'config.json: the text_config is of "{kind}", an encoder-decoder, which is not supported; this system is '
            "with a decoder alone, such as OPT, Llama or Vicuna"
        )
    text = read_text(described, "language_model.lm_head.weight" not in names)
    projector = qformer(fields("qformer_config"), fields("num_query_tokens"), vision, instructed)
    token = fields("image_token_index")
    fields.finish()
    table = (
        *tower_weights(vision, "vision_model.", "vision/"),
        *qformer_weights(projector),
        *text.table("language_model.model.", "language_model.lm_head."),
    )
    config = MultimodalConfig(vision, None, image_projector=projector, decoder=text.decoder)
    unused = () if instructed else UNUSED
    if token is None:  # a file of before there was such a token, in whose text pictures have no place
        return System(config, table, text, unused)
    fixed = {
        "token_id": token,
        "size": (vision.height, vision.width),
        "num_tokens": config.image_tokens,
        "defaults": IMAGE_PROCESSOR,
    }
    if instructed:
        described = {"vocab": projector.text_vocab, "longest": projector.text_length}
        rule = partial(InstructedImage, **described, **fixed)
        return System(config, table, text, rule=rule, template=INSTRUCTED_TEMPLATE)
    return System(config, table, text, unused, rule=partial(QueriesFirst, **fixed), template=TEMPLATE)


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    return system(values, names, instructed=False)


def tower_system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    """A tower alone."""
    config = tower(values, Output(), "config.json")
    return System(config, tower_weights(config))


FAMILY = Family("blip-2", ("text", "image"), _system)
TOWER = Family("blip_2_vision_model", ("image",), tower_system, ((r"^vision_model\.", ""),))
