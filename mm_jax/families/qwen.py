"""Qwen-VL (v1) and Qwen-7B alone (reference: the authors' QWenLMHeadModel): an OpenCLIP tower, a resampler whose
queries have places, and a decoder whose texts may be longer than those that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mm_jax.data.box_text import BoxText
from mm_jax.data.image import Transform
from mm_jax.data.media_rule import MEDIA, BoundRule, FixedImage, Item, Settings
from mm_jax.data.messages import Box, Part
from mm_jax.data.pixels import BICUBIC, CLIP_MEAN, CLIP_STD, PixelRule
from mm_jax.errors import UserError
from mm_jax.families import minicpmv
from mm_jax.families.family import LINEAR, Family, Names, System, Text, Weight, linear, norm
from mm_jax.families.family import Part as Cut
from mm_jax.families.fields import Fields
from mm_jax.models import DecoderConfig, MultimodalConfig, ProjectorConfig, RopeScaling, ViTConfig

DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22_016,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "seq_length": 2048,
    "rotary_pct": 1.0,
    "rotary_emb_base": 10_000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "scale_attn_weights": True,
    "eos_token_id": None,
    "pad_token_id": None,
}
# how the reference computes, and dropout
HOW = ("attn_dropout_prob", "emb_dropout_prob", "bf16", "fp16", "fp32", "onnx_safe", "softmax_in_fp32",
       "tokenizer_type", "use_flash_attn")  # fmt: skip
VISION = {
    "image_size": 448,
    "patch_size": 14,
    "width": 1664,
    "layers": 48,
    "heads": 16,
    "mlp_ratio": 4.9231,
    "n_queries": 256,
    "output_dim": 4096,
    "image_start_id": 151_857,
}
TABLE_SIDE = 16  # of the tower's positions, whatever the picture's size
HEAD_DIM = 128  # of the resampler
NORM_EPS = 1e-6  # of tower and resampler
RELEASED = 151_857  # image_start_id of the released vocabulary
END_OF_TEXT, TURN, END_OF_TURN = 151_643, 151_644, 151_645  # its other tokens
BOXES = BoxText(
    "<box>({0},{1}),({2},{3})</box>",
    r"(?:<box>)?\((\d+),(\d+)\),\((\d+),(\d+)\)(?:</box>)?",
    largest=999,
    opening=r"(<box>|\()(\(?\d*,?\d*\)?,?(\(\d*,?\d*)?)?$",
    tags=("<ref>", "</ref>"),
)
TEMPLATE = (
    "{% set seen = namespace(pictures=0) %}"
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set seen.pictures = seen.pictures + 1 %}"
    "{{ 'Picture ' ~ seen.pictures ~ ': <img></img>\n' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def text(values: Mapping[str, Any], tied: bool, where: str) -> Text:
    """See `mm_jax.families.llama.text`."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip(*HOW)
    for name, value in (("no_bias", True), ("scale_attn_weights", True), ("rotary_pct", 1)):
        if fields(name) != value:
            raise fields.unsupported(name, f"{value} is")
    heads, width, size, trained = (
        fields(name) for name in ("num_attention_heads", "hidden_size", "kv_channels", "seq_length")
    )
    if heads * size != width:
        raise fields.unsupported(
            "kv_channels", f"{heads} heads must have the {width} channels of hidden_size"
        )
    stretched, longest = fields("use_dynamic_ntk"), fields("max_position_embeddings")
    config = DecoderConfig(
        vocab_size=fields("vocab_size"),
        embed_dim=width,
        num_layers=fields("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=size,
        mlp_dim=fields("intermediate_size") // 2,
        rope_theta=float(fields("rotary_emb_base")),
        rope_scaling=RopeScaling("doubling", 1.0, trained) if stretched else None,
        log_length=trained if fields("use_logn_attn") else 0,
        norm_eps=fields("layer_norm_epsilon"),
        tie_embeddings=tied,
        qkv_bias=True,
    )
    released = config.vocab_size > RELEASED
    stops, pad = fields("eos_token_id"), fields("pad_token_id")
    fields.finish()
    # an answer must have the base that its prompt was read with, and the cache does not keep it: it is the trained one
    # as far as texts are no longer than the trained ones
    longest = min(longest, trained) if stretched else longest
    stops = (stops,) if stops is not None else (END_OF_TEXT,) * released
    return Text(config, weights, longest, stops, END_OF_TEXT if pad is None and released else pad)


def weights(config: DecoderConfig, model: str, head: str) -> tuple[Weight, ...]:
    """See `mm_jax.families.llama.weights`; here the names of the model's tensors begin with "transformer."."""
    theirs, ours, width = model.replace("model.", "transformer."), "decoder/layers/", config.embed_dim
    layer = f"{theirs}h.{{}}."
    table = [
        Weight(f"{theirs}wte.weight", "decoder/embedding/embedding"),
        Weight(f"{layer}ln_1.weight", f"{ours}attention_norm/scale"),
        *linear(f"{layer}attn.c_proj", f"{ours}attention/out", bias=False),
        Weight(f"{layer}ln_2.weight", f"{ours}mlp_norm/scale"),
        *linear(f"{layer}mlp.w1", f"{ours}mlp/up", bias=False),
        *linear(f"{layer}mlp.w2", f"{ours}mlp/gate", bias=False),
        *linear(f"{layer}mlp.c_proj", f"{ours}mlp/down", bias=False),
        Weight(f"{theirs}ln_f.weight", "decoder/norm/scale"),
    ]
    for k, name in enumerate(("query", "key", "value")):
        part, path = Cut(k * width, (k + 1) * width, 3 * width), f"{ours}attention/{name}"
        table.append(Weight(f"{layer}attn.c_attn.weight", f"{path}/kernel", LINEAR, part=part))
        table.append(Weight(f"{layer}attn.c_attn.bias", f"{path}/bias", part=part))
    if not config.tie_embeddings:
        table.append(Weight(f"{head}weight", "decoder/head/kernel", LINEAR))
    return tuple(table)


def _tower_weights(config: ViTConfig, theirs: str) -> list[Weight]:
    layer, ours = f"{theirs}transformer.resblocks.{{}}.", "vision/layers/"
    sides = (("p", config.patch_size), ("q", config.patch_size))
    table = [
        Weight(f"{theirs}conv1.weight", "vision/patch_embed/kernel", "d c p q -> (p q c) d", sides),
        Weight(f"{theirs}positional_embedding", "vision/positions"),
        *norm(f"{theirs}ln_pre", "vision/pre_norm"),
        *norm(f"{layer}ln_1", f"{ours}attention_norm"),
        *linear(f"{layer}attn.out_proj", f"{ours}attention/out"),
        *norm(f"{layer}ln_2", f"{ours}mlp_norm"),
        *linear(f"{layer}mlp.c_fc", f"{ours}mlp/up"),
        *linear(f"{layer}mlp.c_proj", f"{ours}mlp/down"),
    ]
    # rows go by head: of each head the query, the key, the value
    heads = (("n", config.num_heads),)
    apart = (*heads, ("t", 3))
    for k, name in enumerate(("query", "key", "value")):
        path = f"{ours}attention/{name}"
        kernel = Cut(k, k + 1, 3, "(n t h) i -> t n h i", apart)
        bias = Cut(k, k + 1, 3, "(n t h) -> t n h", apart)
        theirs_ = f"{layer}attn.in_proj"
        table.append(Weight(f"{theirs_}.weight", f"{path}/kernel", "1 n h i -> i (n h)", heads, kernel))
        table.append(Weight(f"{theirs_}.bias", f"{path}/bias", "1 n h -> (n h)", heads, bias))
    return table


def _system(values: Mapping[str, Any], names: Names) -> System:
    tied = "lm_head.weight" not in names
    text_ = text({k: v for k, v in values.items() if k != "visual"}, tied, "config.json")
    decoder = text_.decoder
    stops = (TURN, END_OF_TURN) if decoder.vocab_size > RELEASED else ()
    if not values.get("visual"):
        config = MultimodalConfig(None, None, decoder=decoder)
        return System(config, text_.table(), text_, template=TEMPLATE, stops=stops)
    fields = Fields(values["visual"], VISION, "config.json: visual")
    width, out, queries = fields("width"), fields("output_dim"), fields("n_queries")
    if out != decoder.embed_dim:
        raise fields.unsupported("output_dim", f"the decoder is {decoder.embed_dim} wide")
    if round(queries**0.5) ** 2 != queries:
        raise fields.unsupported("n_queries", "queries fill a square")
    size = fields.square("image_size")
    vision = ViTConfig(
        height=size,
        width=size,
        patch_size=fields.square("patch_size"),
        embed_dim=width,
        num_layers=fields("layers"),
        num_heads=fields("heads"),
        mlp_dim=int(width * fields("mlp_ratio")),
        position_grid=(TABLE_SIDE, TABLE_SIDE),
        activation="gelu",
        norm_eps=NORM_EPS,
        patch_bias=False,
        pre_norm=True,
        post_norm=False,
    )
    projector = ProjectorConfig(
        "resampler",
        hidden_dim=out,
        num_queries=queries,
        num_heads=max(out // HEAD_DIM, 1),
        use_bias=False,
        norm_eps=NORM_EPS,
        residual=False,
        input_map=width != out,
        stored_positions=True,
    )
    start = fields("image_start_id")
    fields.finish()
    theirs = "transformer.visual."
    table = (
        *_tower_weights(vision, theirs),
        *minicpmv.resampler(projector, f"{theirs}attn_pool.", theirs),
        *text_.table(),
    )
    config = MultimodalConfig(vision, None, image_projector=projector, decoder=decoder)
    rule = partial(PathRule, start=start, size=(size, size), queries=queries)
    return System(config, table, text_, rule=rule, template=TEMPLATE, stops=stops)


class PathRule(FixedImage):
    """Pictures of one size. The text has their paths, as UTF-8 bytes filled up to the number of features, between two
    markers; all of what stands there gives way to the features.

    Args:
      start: id of the first marker; the next ids are those of the second and of what fills up.
      queries: features of a picture.
    """

    placeholders = {"image": "<img></img>"}
    opening = BOXES.begun
    ignored = BoundRule.ignored + ("image_bound",)

    def __init__(self, settings: Settings, *, start: int, size: tuple[int, int], queries: int):
        super().__init__(settings, token_id=start + 2, size=size, num_tokens=queries)
        self.start = start

    @property
    def rule(self) -> PixelRule:
        """The reference's code knows it by heart."""
        height, width = self.size
        return PixelRule({"height": height, "width": width}, BICUBIC, mean=CLIP_MEAN, std=CLIP_STD)

    def marked(self, input_ids: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Raises UserError where not as many ids as a picture has features stand between two markers."""
        found, (start, end, fill) = np.array(input_ids), (self.start + k for k in range(3))
        for row, first in zip(*np.nonzero(input_ids == start), strict=True):
            last = first + 1 + self.num_tokens
            if last >= found.shape[1] or input_ids[row, last] != end:
                raise UserError(
                    f"row {row} of input_ids has a picture at {first}, but not {self.num_tokens} ids between its "
                    f"markers {start} and {end}"
                )
            found[row, first + 1 : last] = fill
        return found

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        written = f"<img>{MEDIA * self.num_tokens}</img>"
        return [
            Item(item.index, item.features, item.arrays, written)
            for item in super().items(kind, arrays, counts)
        ]

    def write_box(self, box: Box, transform: Transform) -> str:
        return BOXES.write(box, transform)

    def parse(self, text: str, transforms: Sequence[Transform]) -> list[Part]:
        return BOXES.parse(text, transforms)


FAMILY = Family("qwen", ("text", "image"), _system)
