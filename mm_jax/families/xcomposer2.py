"""InternLM-XComposer2, plain, 4KHD and 2.5 (reference: the authors' InternLMXComposer2ForCausalLM): CLIP, an MLP, and
InternLM2 with low-rank maps for image tokens.

The high-resolution ones cut a picture into tiles, put an overview in front, and end each row of merged features with a
learned vector; such checkpoints are known by those vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.data.bicubic import bicubic
from mm_jax.data.media_rule import MOST, Arrays, BoundRule, Item, Settings
from mm_jax.data.pieces import canvas
from mm_jax.data.pixels import BICUBIC, BILINEAR, CLIP_MEAN, CLIP_STD, PixelRule, resize
from mm_jax.errors import UserError
from mm_jax.families import internlm2
from mm_jax.families.clip import Output, common, unused
from mm_jax.families.clip import weights as tower_weights
from mm_jax.families.family import LINEAR, Family, Names, System, Weight
from mm_jax.families.fields import Fields
from mm_jax.models import DecoderConfig, MultimodalConfig, ProjectorConfig

# The tower's sizes and the adapters' are not in released configs, the reference's code knows them by heart.
CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
DEFAULTS = {"plora_r": 256, "plora_alpha": 256, "img_size": None, "vision_config": {}}
TOWER = "vit.vision_tower.vision_model."
TABLE = f"{TOWER}embeddings.position_embedding.weight"
END_OF_TURN = 92_542  # [UNUSED_TOKEN_145]
NEWEST = 560  # pixels of a tile of 2.5
NEW_LINE, END_OF_OVERVIEW = 0, 1  # the markers
SEPARATORS = {"plora_sub_GN": "1 1 1 d -> d", "plora_glb_GN": "1 1 d -> d"}
# of `chat` in the reference's code
SYSTEM = (
    "You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\\n"
    "- InternLM-XComposer (浦语·灵笔) is a multi-modality conversational language model that is developed by "
    "Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\\n"
    "- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently in the language chosen by the user such "
    "as English and 中文.\\n"
    "- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating responses effectively based on the "
    "provided image."
)
TEMPLATE = (
    "{{% if messages[0]['role'] != 'system' and '{system}' %}}"
    "{{{{ '[UNUSED_TOKEN_146]system\n{system}[UNUSED_TOKEN_145]\n' }}}}{{% endif %}}"
    "{{% for message in messages %}}{{{{ '[UNUSED_TOKEN_146]' + message['role'] + '\n' }}}}"
    "{{% if message['role'] == 'assistant' %}}"
    "{{% generation %}}{{{{ message['content'] + '[UNUSED_TOKEN_145]' }}}}{{% endgeneration %}}{{{{ '\n' }}}}"
    "{{% else %}}{{{{ message['content'] + '[UNUSED_TOKEN_145]\n' }}}}{{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '[UNUSED_TOKEN_146]assistant\n' }}}}{{% endif %}}"
)


def _system(values: Mapping[str, Any], names: Names) -> System:
    tiled = set(SEPARATORS) <= names
    own = {*DEFAULTS, "max_length"}
    fields = Fields({name: value for name, value in values.items() if name in own}, DEFAULTS)
    fields.skip("img_size", "max_length")
    rank, alpha = fields("plora_r"), fields("plora_alpha")
    clip = dict(fields("vision_config"))
    fields.finish()
    if TABLE in names.shapes:
        # the table was stretched to another size of picture before it was saved, whatever the config says
        side = math.isqrt(names.shapes[TABLE][0] - 1)
        clip["image_size"] = side * clip.get("patch_size", CLIP_LARGE["patch_size"])
    vision = common(
        Fields(clip, CLIP_LARGE, "config.json: vision_config"),
        Output(),
        class_token="drop",
        patch_bias=False,
        pre_norm=True,
        post_norm=False,
    )
    text = internlm2.text({k: v for k, v in values.items() if k not in own}, False, "config.json")
    decoder = replace(text.decoder, adapter_rank=rank, adapter_scale=alpha / rank)
    text = replace(text, decoder=decoder, weights=_decoder_weights)
    merge = (2, 2) if tiled else (1, 1)
    projector = ProjectorConfig("mlp", merge, hidden_dim=decoder.embed_dim, activation="gelu", norm=False)
    config = MultimodalConfig(
        vision,
        None,
        image_projector=projector,
        decoder=decoder,
        markers=len(SEPARATORS) * tiled,
        markers_projected=tiled,
    )
    table = [*tower_weights(vision, TOWER, "vision/"), *text.table()]
    for name, path in (("0", "hidden"), ("2", "out")):
        table.append(Weight(f"vision_proj.{name}.weight", f"image_projector/{path}/kernel", LINEAR))
        table.append(Weight(f"vision_proj.{name}.bias", f"image_projector/{path}/bias"))
    if tiled:
        table += [Weight(name, f"marker{k}", axes) for k, (name, axes) in enumerate(SEPARATORS.items())]
    rule = partial(CanvasRule, tile=vision.height, num_tokens=config.image_tokens, tiled=tiled)
    newest = tiled and vision.height == NEWEST  # 2.5 says who it is only where it is asked to
    template = TEMPLATE.format(system="" if newest else SYSTEM)
    return System(
        config,
        tuple(table),
        text,
        unused(TOWER),
        rule=rule,
        template=template,
        template_first=True,
        stops=(END_OF_TURN,) if decoder.vocab_size > END_OF_TURN else (),
    )


def _decoder_weights(config: DecoderConfig, model: str, head: str) -> tuple[Weight, ...]:
    """InternLM2's, and those of the adapters."""
    layer, ours = f"{model}layers.{{}}.", "decoder/layers/"
    maps = {
        "attention.wqkv": "attention/qkv_adapter",
        "attention.wo": "attention/out_adapter",
        "feed_forward.w1": "mlp/gate_adapter",
        "feed_forward.w3": "mlp/up_adapter",
        "feed_forward.w2": "mlp/down_adapter",
    }
    table = []
    for name, path in maps.items():
        table.append(Weight(f"{layer}{name}.Plora_A.weight", f"{ours}{path}/first/kernel", LINEAR))
        up = f"{layer}{name}.Plora_B"
        if name == "attention.wqkv":
            table += internlm2.fused(config, up, f"{ours}{path}/", bias=False)
        else:
            last = path.split("/")[1].removesuffix("_adapter")
            table.append(Weight(f"{up}.weight", f"{ours}{path}/{last}/kernel", LINEAR))
    return (*internlm2.weights(config, model, head), *table)


def layout(columns: int, rows: int, side: int) -> np.ndarray:
    """Which feature or marker each token of a picture takes: the overview's, then those of columns x rows tiles row by
    row of the whole picture; side x side features of the overview come first, then those of each tile."""

    def lines(grid: np.ndarray) -> np.ndarray:
        return np.pad(grid, ((0, 0), (0, 1)), constant_values=-2 - NEW_LINE).ravel()

    each = np.arange(side * side).reshape(side, side)
    numbers = 1 + np.arange(columns * rows).reshape(rows, columns)
    whole = rearrange(numbers[..., None, None] * side * side + each, "r c h w -> (r h) (c w)")
    return np.concatenate([lines(each), [-2 - END_OF_OVERVIEW], lines(whole)]).astype(np.int32)


def cut(canvas: np.ndarray, tile: int) -> np.ndarray:
    """A canvas [H, W, C] of whole tiles to the overview and the tiles: [1 + tiles, tile, tile, C]."""
    tiles = rearrange(canvas, "(r h) (c w) d -> (r c) h w d", h=tile, w=tile)
    return np.concatenate([bicubic(canvas, (tile, tile))[None], tiles])


class CanvasRule(BoundRule):
    """Pictures of one size (plain), or on a white canvas of tiles (4KHD and, with tiles of NEWEST pixels, 2.5).

    Args:
      tile: pixels of a side of what the tower sees.
      num_tokens: features of it.
      tiled: whether there are canvases.
    """

    names = {"image": tuple(f"pixel_values_{k}" for k in range(MOST))}
    placeholders = {"image": "<ImageHere>"}
    joined = ""

    def __init__(self, settings: Settings, *, tile: int, num_tokens: int, tiled: bool):
        super().__init__(settings)
        self.tile, self.num_tokens, self.tiled = tile, num_tokens, tiled
        self.tokens = {"image": 0}  # <unk>, which no text is written with
        self.pieces = "first" if tiled else "every"
        self.pixels = PixelRule(None, mean=CLIP_MEAN, std=CLIP_STD)

    def images(self, images: Sequence[np.ndarray], most: int | None = None) -> Arrays:
        """`most`: tiles that there may be; 16, or 24 in 2.5 and 6 where there are several pictures."""
        newest = self.tile == NEWEST
        most = most or ((24 if len(images) == 1 else 6) if newest else 16)
        drawn = [self._canvas(image, most, newest) for image in images]
        arrays = (self.pixels.normalise(image).transpose(2, 0, 1)[None] for image in drawn)
        return {f"pixel_values_{k}": array for k, array in enumerate(arrays)}

    def _canvas(self, picture: np.ndarray, most: int, newest: bool) -> np.ndarray:
        if not self.tiled:
            return resize(picture, (self.tile, self.tile), BICUBIC)
        turned = picture.shape[1] < picture.shape[0]
        picture = picture.swapaxes(0, 1) if turned else picture
        size = (picture.shape[1], picture.shape[0])
        plan = canvas(size, self.tile, most, centred=not newest, enlarge=not newest)
        left, top, right, bottom = plan.box
        drawn = np.full((plan.size[1], plan.size[0], 3), 255, np.uint8)
        drawn[top:bottom, left:right] = resize(
            np.ascontiguousarray(picture), (bottom - top, right - left), BILINEAR
        )
        return drawn.swapaxes(0, 1) if turned else drawn

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        return [self._item(arrays[name]) for name in self.names["image"] if name in arrays]

    def _item(self, pixels: np.ndarray) -> Item:
        if pixels.ndim != 4 or pixels.shape[:2] != (1, 3) or any(n % self.tile for n in pixels.shape[2:]):
            raise UserError(
                f"a picture has shape {list(pixels.shape)}; [1, 3, H, W] in tiles of {self.tile} is needed"
            )
        picture = np.moveaxis(pixels[0], 0, -1)
        if not self.tiled:
            return Item(
                np.arange(self.num_tokens, dtype=np.int32), self.num_tokens, {"pixel_values": picture[None]}
            )
        rows, columns = (n // self.tile for n in picture.shape[:2])
        pieces = cut(picture, self.tile)
        index = layout(columns, rows, math.isqrt(self.num_tokens))
        return Item(index, len(pieces) * self.num_tokens, {"pixel_values": pieces})


FAMILY = Family("internlmxcomposer2", ("text", "image"), _system)
