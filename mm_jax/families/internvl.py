"""InternVL 2 to 3 (reference: InternVLForConditionalGeneration): InternViT, pixel shuffle with an MLP, and a decoder.

There are two kinds of files: those of transformers ("internvl"), and OpenGVLab's own ("internvl_chat"), which hold
the same numbers under other names, with query, key and value of the tower in one tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.data.image import Transform
from mm_jax.data.media_rule import MEDIA, Arrays, FixedImage, Item, MediaRule, Settings, channels_last
from mm_jax.data.messages import Box, Part, Text
from mm_jax.data.pieces import tiles
from mm_jax.data.pixels import BICUBIC, CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, PixelRule, resize
from mm_jax.data.pretrained_tokenizer import token_id as named_token
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
CONTEXT = "<IMG_CONTEXT>"
HEADS = ("language_model.lm_head.weight", "language_model.output.weight")
BOXES = r"(?:<box>)(\[(?:\[ *\d+ *(?:, *\d+ *){3}\],? *)+\])(?:</box>)"
# of GotOcr2ImageProcessor, and of the released files' own code
IMAGE_PROCESSOR = {
    "size": {"height": 384, "width": 384},
    "resample": BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
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
        hidden_dim=text.decoder.embed_dim,
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
    rule = partial(
        TileRule,
        token_id=token,
        size=(vision.height, vision.width),
        num_tokens=config.image_tokens,
        defaults=IMAGE_PROCESSOR,
    )
    return System(config, table, text, intern_vit.unused("vision_tower."), token, rule=rule)


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
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "pad_token_id": None,
    "eos_token_id": None,
    "template": None,
    "system_message": None,
}
NEWER = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
OLDER = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_start|>system\n")
# by the name in config.json: headers of the user's, assistant's and system's turn, the end of each, and the system's
# text where there is no other
TEMPLATES = {
    "internvl2_5": (*CHATML, "<|im_end|>\n", NEWER),
    "internlm2-chat": (*CHATML, "<|im_end|>", OLDER),
    "Hermes-2": (*CHATML, "<|im_end|>", OLDER),
    "phi3-chat": ("<|user|>\n", "<|assistant|>\n", "<|system|>\n", "<|end|>", OLDER),
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
    # what the prompt is made by, and the decoder's width, which its own config has
    dynamic, view = fields("dynamic_image_size"), fields("use_thumbnail")
    least, most = fields("min_dynamic_patch"), fields("max_dynamic_patch")
    fields.skip("image_fold", "hidden_size")
    template = _template(fields("template"), fields("system_message"))
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
        hidden_dim=text.decoder.embed_dim,
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
    rule = partial(
        ReleasedTiles,
        token_id=token,
        size=(vision.height, vision.width),
        num_tokens=config.image_tokens,
        defaults=IMAGE_PROCESSOR | {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD},
        least=least,
        most=most if dynamic else 1,
        view=view,
    )
    unused = intern_vit.unused("vision_model.")
    return System(config, table, text, unused, token, rule=rule, template=template, template_first=True)


def _template(name: str | None, system: str | None) -> str | None:
    """The chat template that the reference's conversation.py has under this name; None for one that it has not."""
    if name not in TEMPLATES:
        return None
    user, assistant, head, end, default = TEMPLATES[name]
    return (
        f"{{% set seen = namespace(system={json.dumps(system or default)}) %}}"
        "{% for message in messages if message['role'] == 'system' %}{% set seen.system = message['content'] %}"
        f"{{% endfor %}}{{{{ {json.dumps(head)} + seen.system + {json.dumps(end)} }}}}"
        "{% for message in messages if message['role'] != 'system' %}{% if message['role'] == 'assistant' %}"
        f"{{{{ {json.dumps(assistant)} }}}}{{% generation %}}{{{{ message['content'] + {json.dumps(end.strip())} }}}}"
        f"{{% endgeneration %}}{{{{ {json.dumps(end[len(end.strip()) :])} }}}}"
        f"{{% else %}}{{{{ {json.dumps(user)} + message['content'] + {json.dumps(end)} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {json.dumps(assistant)} }}}}{{% endif %}}"
    )


class TileRule(FixedImage):
    """Pictures stretched onto the grid of tiles whose shape is nearest, with a view of the whole behind them.

    Args:
      least, most: tiles that there may be, where the image processor's settings say nothing else.
    """

    names = {"image": ("pixel_values", "num_patches"), "video": ("pixel_values_videos",)}
    shared = {"video": "image"}
    placeholders = {"video": "<video>"}
    kept = r"</?box>"
    opening = r"(?P<begun><box>[^<]*$)"

    def __init__(
        self, settings: Settings, *, least: int = 1, most: int = 12, view: bool = True, **options: Any
    ):
        super().__init__(settings, **options)
        self.tokens = dict.fromkeys(self.names, self.tokens["image"])
        self.least, self.most, self.view = least, most, view

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        pieces = [self._pieces(image) for image in images]
        pixels = np.concatenate([self.rule.normalise(tiles).transpose(0, 3, 1, 2) for tiles in pieces])
        return {"pixel_values": pixels, "num_patches": np.array([len(tiles) for tiles in pieces])}

    def _pieces(self, picture: np.ndarray) -> np.ndarray:
        """uint8 [tiles, H, W, 3]"""
        settings, (height, width) = self.settings.image or {}, self.size
        least, most = settings.get("min_patches", self.least), settings.get("max_patches", self.most)
        columns, rows = tiles((picture.shape[1], picture.shape[0]), width, least, most)
        whole = resize(picture, (rows * height, columns * width), self.rule.resample)
        pieces = rearrange(whole, "(r h) (c w) d -> (r c) h w d", h=height, w=width)
        if len(pieces) == 1 or not self.view:
            return pieces
        return np.concatenate([pieces, resize(picture, self.size, self.rule.resample)[None]])

    @cached_property
    def video_rule(self) -> PixelRule:
        """Where there are settings of videos, theirs; frames always get the tower's size."""
        return PixelRule.read(self.settings.video or self.settings.need("image"), self.defaults)

    def videos(self, videos: Sequence[tuple[np.ndarray, float | None]]) -> Arrays:
        """Each frame as one tile; as a list of [frames, 3, H, W] where the videos have different numbers."""
        made = []
        for frames, rate in videos:
            chosen = frames[self._chosen(len(frames), rate)]
            tiles = np.stack([resize(frame, self.size, self.video_rule.resample) for frame in chosen])
            made.append(self.video_rule.normalise(tiles).transpose(0, 3, 1, 2))
        same = len({len(frames) for frames in made}) == 1
        return {"pixel_values_videos": np.stack(made) if same else made}

    def _chosen(self, total: int, rate: float | None) -> np.ndarray:
        """int [n], the frames of a video that are looked at (reference: InternVLVideoProcessor.sample_frames)."""
        settings = self.settings.video or {}
        if not settings.get("do_sample_frames"):
            return np.arange(total)
        count, wanted = settings.get("num_frames"), settings.get("fps")
        if count is None and wanted is not None:
            if rate is None:
                raise UserError(
                    f"{wanted} frames a second are to be looked at, but the video does not say its rate"
                )
            count = int(total / rate * wanted)
        if not count or count > total:
            raise UserError(f"a video of {total} frames, of which {count or 'no'} are to be looked at")
        shift = settings.get("initial_shift", True)
        shift = total / count / 2 if shift is True else shift
        return np.arange(shift, total, total / count).astype(np.float32).astype(int)

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        if kind == "video":
            return [self._video(channels_last(frames, self.size)) for frames in arrays["pixel_values_videos"]]
        pixels = channels_last(arrays["pixel_values"], self.size)
        found = []
        ends = np.cumsum(arrays.get("num_patches", np.ones(len(pixels), int)))
        for part in np.split(pixels, ends[:-1]):
            features = len(part) * self.num_tokens
            text = f"<img>{MEDIA * features}</img>"
            found.append(Item(np.arange(features, dtype=np.int32), features, {"pixel_values": part}, text))
        return found

    def _video(self, frames: np.ndarray) -> Item:
        each = f"<img>{MEDIA * self.num_tokens}</img>"
        text = "\n".join(f"Frame{k + 1}: {each}" for k in range(len(frames)))
        features = len(frames) * self.num_tokens
        return Item(np.arange(features, dtype=np.int32), features, {"pixel_values": frames}, text)

    def transform(self, size: tuple[int, int]) -> Transform:
        return MediaRule.transform(self, size)  # boxes speak of the whole picture

    def framing(self, size: tuple[int, int]) -> Transform:
        return MediaRule.framing(self, size)  # which is stretched

    def write_box(self, box: Box, transform: Transform) -> str:
        corners = [round(1000 * value) for value in transform.forward(box.box)]
        return f"<box>[{corners}]</box>"

    def parse(self, text: str, transforms: Sequence[Transform]) -> list[Part]:
        found: list[Part] = []
        for k, piece in enumerate(re.split(BOXES, text)):
            if k % 2 == 0 or not transforms:
                found += [Text(piece)] if piece else []
                continue
            for corners in re.findall(r"\[([^\[\]]*)\]", piece):
                values = [float(value) / 1000 for value in corners.split(",")]
                found.append(Box(transforms[0].inverse(tuple(values))))
        return found


class ReleasedTiles(TileRule):
    """Those of the released files, whose config does not say which token stands for a feature."""

    joined = "\n"
    placeholders = {"image": "<image>", "video": "<video>"}

    def __init__(self, settings: Settings, *, token_id: int | None, **options: Any):
        found = token_id if token_id is not None else named_token(settings.where, CONTEXT)
        super().__init__(settings, token_id=-1 if found is None else found, **options)
        if found is None:  # no tokenizer: texts alone
            self.tokens = {}


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


FAMILY = Family("internvl", ("text", "image", "video"), _system, RENAMES)
ORIGINAL = Family("internvl_chat", ("text", "image", "video"), _original_system)
