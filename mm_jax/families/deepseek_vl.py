"""DeepSeek-VL (references: DeepseekVLForConditionalGeneration, which looks through SigLIP alone, and
DeepseekVLHybridForConditionalGeneration, through SigLIP and SAM), with an MLP and a Llama."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mm_jax.data.image import Transform
from mm_jax.data.media_rule import Arrays, Item, MediaRule, Settings, channels_last
from mm_jax.data.pixels import BICUBIC, CLIP_MEAN, CLIP_STD, PixelRule, pad_to_square, resize
from mm_jax.errors import UserError
from mm_jax.families import sam, siglip
from mm_jax.families.clip import Output, unused
from mm_jax.families.clip import weights as tower_weights
from mm_jax.families.family import LINEAR, Family, Names, System, Weight
from mm_jax.families.fields import Fields
from mm_jax.families.parts import read_text
from mm_jax.models import HybridConfig, MultimodalConfig, ProjectorConfig

DEFAULTS = {"text_config": {}, "vision_config": {}, "high_res_vision_config": {}, "image_token_id": 100_015}
# of DeepseekVLImageProcessor and DeepseekVLHybridImageProcessor
IMAGE_PROCESSOR = {
    "size": {"height": 384, "width": 384},
    "resample": BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "high_res_size": {"height": 1024, "width": 1024},
    "high_res_resample": BICUBIC,
    "high_res_image_mean": CLIP_MEAN,
    "high_res_image_std": CLIP_STD,
    "rescale_factor": 1 / 255,
    "min_size": 14,
    "do_pad": True,
}
# of VLChatProcessor, the authors' code
TEMPLATE = (
    "{% set seen = namespace(system='You are a helpful language and vision assistant. You are able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.') %}"
    "{% macro text(content) %}{% for part in content %}"
    "{{ '<image_placeholder>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endmacro %}"
    "{% for message in messages if message['role'] == 'system' %}{% set seen.system = text(message['content']) %}"
    "{% endfor %}{% if seen.system %}{{ seen.system + '\n\n' }}{% endif %}"
    "{% for message in messages if message['role'] != 'system' %}{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' }}{% generation %}{{ text(message['content']) + eos_token }}{% endgeneration %}"
    "{% else %}{{ 'User: ' + text(message['content']) + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
RENAMES = ((r"^model\.vision_model\.vision_model\.", "model.vision_model."),)


def _system(values: Mapping[str, Any], names: Names) -> System:
    hybrid = values["model_type"] == "deepseek_vl_hybrid"
    fields = Fields(values, DEFAULTS)
    low = siglip.tower(fields("vision_config") or {}, Output(), "config.json: vision_config")
    text = read_text(fields("text_config") or {}, "lm_head.weight" not in names)
    width = text.decoder.embed_dim
    table = list(tower_weights(low, "model.vision_model.", "vision/low/" if hybrid else "vision/"))
    if hybrid:
        high = sam.tower(fields("high_res_vision_config") or {}, "config.json: high_res_vision_config")
        vision = HybridConfig(low, high)
        projector = ProjectorConfig("branches", activation="gelu", branch_dims=vision.branch_dims)
        maps = {"high_res_vision_proj": "branch0", "vision_proj": "branch1", "proj": "out"}
        table += sam.weights(high, "model.high_res_vision_model.vision_encoder.", "vision/high/")
        table += sam.neck("model.high_res_vision_neck.", "vision/neck/")
        table += [
            Weight(f"model.high_res_vision_proj.conv{k + 1}.weight", f"vision/half{k}/kernel", sam.CONV)
            for k in range(2)
        ]
        table.append(Weight("model.high_res_vision_alpha", "vision/factor"))
    else:
        vision, maps = low, {"linear1": "hidden", "linear2": "out"}
        projector = ProjectorConfig("mlp", hidden_dim=width, activation="gelu", norm=False)
    token = fields("image_token_id")
    fields.finish()
    for name, path in maps.items():
        table.append(Weight(f"model.aligner.{name}.weight", f"image_projector/{path}/kernel", LINEAR))
        table.append(Weight(f"model.aligner.{name}.bias", f"image_projector/{path}/bias"))
    table += text.table("model.language_model.", "lm_head.")
    config = MultimodalConfig(vision, None, image_projector=projector, decoder=text.decoder)
    rule = partial(
        PairRule if hybrid else SquareRule,
        token_id=token,
        sizes=vision.inputs,
        num_tokens=config.image_tokens,
    )
    return System(
        config, tuple(table), text, unused("model.vision_model."), token, rule=rule, template=TEMPLATE
    )


class SquareRule(MediaRule):
    """The long side brought to a square's, and the rest of the square filled with the mean colour.

    Args:
      token_id: that stands for a feature.
      sizes: (height, width) of the encoder's pictures by name.
      num_tokens: features of a picture.
    """

    names = {"image": ("pixel_values",)}

    def __init__(
        self, settings: Settings, *, token_id: int, sizes: Mapping[str, tuple[int, int]], num_tokens: int
    ):
        super().__init__(settings)
        self.tokens, self.sizes, self.num_tokens = {"image": token_id}, sizes, num_tokens

    def _values(self) -> dict[str, Any]:
        return IMAGE_PROCESSOR | {k: v for k, v in self.settings.need("image").items() if v is not None}

    def _square(self, picture: np.ndarray, prefix: str = "") -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [side, side, 3]."""
        values = self._values()
        size = values[f"{prefix}size"]
        if len({size["height"], size["width"]}) != 1:
            raise UserError(f"preprocessor_config.json: {prefix}size is no square")
        longest = max(picture.shape[:2])
        sides = [max(round(n * (size["height"] / longest)), values["min_size"]) for n in picture.shape[:2]]
        picture = resize(picture, tuple(sides), values[f"{prefix}resample"])
        if not values["do_pad"]:
            return picture
        return pad_to_square(picture, tuple(int(m * 255) for m in values[f"{prefix}image_mean"]))

    def _normalise(self, picture: np.ndarray, prefix: str = "") -> np.ndarray:
        values = self._values()
        mean, std = (tuple(values[f"{prefix}image_{name}"]) for name in ("mean", "std"))
        rule = PixelRule(None, rescale=values["rescale_factor"], mean=mean, std=std)
        return rule.normalise(picture).transpose(2, 0, 1)

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        return {"pixel_values": np.stack([self._normalise(self._square(image)) for image in images])}

    def items(self, kind: str, arrays: Mapping[str, np.ndarray], counts: Sequence[int]) -> list[Item]:
        if lost := set(self.sizes) - set(arrays):
            raise UserError(f"a picture needs {', '.join(sorted(lost))} too")
        pixels = {name: channels_last(arrays[name], size) for name, size in self.sizes.items()}
        index = np.arange(self.num_tokens, dtype=np.int32)
        return [
            Item(index, self.num_tokens, {name: array[k : k + 1] for name, array in pixels.items()})
            for k in range(len(pixels["pixel_values"]))
        ]

    def framing(self, size: tuple[int, int]) -> Transform:
        side = max(size)
        if not self._values()["do_pad"]:
            return super().framing(size)
        return Transform(size, (1.0, 1.0), ((side - size[0]) // 2, (side - size[1]) // 2), (side, side))


class PairRule(SquareRule):
    """The same picture for both encoders; the small one is made of the large one."""

    names = {"image": ("pixel_values", "high_res_pixel_values")}

    def images(self, images: Sequence[np.ndarray]) -> Arrays:
        large = [self._square(image, "high_res_") for image in images]
        small = [self._square(image) for image in large]
        return {
            "pixel_values": np.stack([self._normalise(image) for image in small]),
            "high_res_pixel_values": np.stack([self._normalise(image, "high_res_") for image in large]),
        }


FAMILY = Family("deepseek_vl", ("text", "image"), _system, RENAMES)
HYBRID = Family("deepseek_vl_hybrid", ("text", "image"), _system, RENAMES)
