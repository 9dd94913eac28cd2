"""Tokenizer, chat template and media settings of a model that was put together from parts, in one directory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mm_jax.checkpoint import safetensors
from mm_jax.checkpoint.assembly import Part
from mm_jax.checkpoint.hf import HFCheckpoint, stop_ids
from mm_jax.checkpoint.kept import is_kept
from mm_jax.checkpoint.safetensors import Entry
from mm_jax.data.frame_rule import MEL, FrameAudio
from mm_jax.data.joined_rule import BOXES, JoinedRule
from mm_jax.data.media_rule import FixedImage, MediaRule, Settings
from mm_jax.data.mel_rule import RATE, MelAudio
from mm_jax.data.naflex_rule import NaflexRule
from mm_jax.data.native_rule import NativeRule
from mm_jax.data.pixels import PixelRule
from mm_jax.data.pretrained import PretrainedProcessor
from mm_jax.data.pretrained_tokenizer import PretrainedTokenizer
from mm_jax.errors import UserError
from mm_jax.families.deepseek_vl import PairRule
from mm_jax.families.media import layout_of, patch_layout
from mm_jax.families.qwen2_vl import IMAGE_PROCESSOR
from mm_jax.models import (
    ConformerConfig,
    HybridConfig,
    MultimodalConfig,
    NativeViTConfig,
    ProjectorConfig,
    ViTConfig,
)
from mm_jax.models.encoders import AudioConfig

MEDIA = {"image": "<image>", "audio": "<audio>"}
ENCODERS = {"image": "vision", "audio": "audio"}
SETTINGS = {"image": "image_processor", "audio": "feature_extractor"}  # as processor_config.json calls them
IDS = "special_ids.json"
PARTS = "parts.json"  # the config.json of each part
LEFT = "left.safetensors"  # of a vision tower: its last norm, which may not be computed with
FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
# of LLaVA-1.5 (Vicuna 1.1), for decoders without a chat template
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
    "{% else %}{{ 'USER: ' + message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def vocabulary(parts: Mapping[str, Part]) -> int:
    """Tokens of the decoder's tokenizer with those for media."""
    return _tokenizer(parts).size


def _tokenizer(parts: Mapping[str, Part]) -> PretrainedTokenizer:
    tokenizer = PretrainedTokenizer.load(parts["decoder"].opened.directory)
    tokenizer.add([token for kind, token in MEDIA.items() if ENCODERS[kind] in parts])
    return tokenizer


def write_pretrained(parts: Mapping[str, Part], directory: Path) -> None:
    """The decoder's tokenizer and template, with a token for each kind of media, and the encoders' settings."""
    directory.mkdir(parents=True, exist_ok=True)
    decoder = parts["decoder"].opened
    for name in FILES:
        if (decoder.directory / name).is_file():
            shutil.copyfile(decoder.directory / name, directory / name)
    _tokenizer(parts).backend.save(str(directory / "tokenizer.json"))
    settings = {
        SETTINGS[kind]: dict(Settings.read(parts[part].opened.directory).need(kind))
        for kind, part in ENCODERS.items()
        if part in parts
    }
    pad = None if decoder.system.text is None else decoder.system.text.pad_id
    stops = stop_ids(decoder.directory, decoder.system)
    kept = {name: part.opened.values for name, part in parts.items()}
    for name, values in (
        ("processor_config.json", settings),
        (IDS, {"stop": list(stops), "pad": pad}),
        (PARTS, kept),
    ):
        (directory / name).write_text(json.dumps(values, indent=2) + "\n")
    if "vision" in parts:
        tensors = parts["vision"].opened.tensors
        last = {name: tensors[name].map() for name in tensors if "post_layernorm." in name}
        entries = [
            Entry(name[name.index("post_layernorm.") :], x.dtype, x.shape, partial(np.asarray, x))
            for name, x in last.items()
        ]
        safetensors.write(directory / LEFT, entries)


def processor_of(checkpoint: HFCheckpoint, model: MultimodalConfig) -> PretrainedProcessor:
    """That of a whole system. Raises UserError for a directory without a tokenizer."""
    text, rule = checkpoint.system.text, checkpoint.rule
    layout = layout_of(model, text.pad_id, checkpoint.stop_ids, rule.taps)
    return PretrainedProcessor.load(
        checkpoint.directory,
        rule,
        pad_id=layout.pad_id,
        stop_ids=checkpoint.stop_ids,
        template=checkpoint.system.template,
        template_first=checkpoint.system.template_first and not is_kept(checkpoint.directory),
        layout=layout,
    )


def is_pretrained(directory: Path) -> bool:
    """Whether `write_pretrained` wrote it."""
    return (directory / IDS).is_file()


def load_pretrained(directory: Path, model: MultimodalConfig) -> PretrainedProcessor:
    """What `write_pretrained` wrote, for a model of these sizes. Raises UserError for damaged files."""
    settings, tokenizer = Settings.read(directory), PretrainedTokenizer.load(directory)
    try:
        ids = json.loads((directory / IDS).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / IDS} cannot be read: {error}") from None
    rules: dict[str, MediaRule] = {}
    if model.vision is not None:
        rules["image"] = image_rule(settings, tokenizer.id(MEDIA["image"]), model)
    if (audio := model.audio) is not None:
        conformer = isinstance(audio, ConformerConfig)
        rules["audio"] = (FrameAudio if conformer else MelAudio)(
            settings,
            token_id=tokenizer.id(MEDIA["audio"]),
            shape=(audio.num_mels, audio.max_frames),
            num_tokens=model.audio_tokens,
            tokens_of=AudioTokens(audio, model.audio_projector),
            all_frames=not conformer and not audio.mask_frames,
        )
    layout = layout_of(model, ids["pad"], tuple(ids["stop"]))
    rule = JoinedRule(rules, {kind: MEDIA[kind] for kind in rules}, layout.position_axes)
    return PretrainedProcessor.load(
        directory, rule, pad_id=layout.pad_id, stop_ids=ids["stop"], template=TEMPLATE, layout=layout
    )


def image_rule(settings: Settings, token_id: int, model: MultimodalConfig) -> MediaRule:
    """How pictures are prepared for the tower of a model that was put together.

    Raises UserError for a tower whose projector would not give what the rule counts on.
    """
    vision = model.vision
    if isinstance(vision, NativeViTConfig):
        projector, merge = model.image_projector, (vision.merge**2, 1)
        if projector.kind not in ("linear", "mlp") or projector.merge != merge:
            raise UserError(
                f"model.image_projector is {projector.kind} with merge {projector.merge}; a tower of patches needs "
                f"linear or mlp with merge {merge}"
            )
        of_patches = NaflexRule if vision.smooth_table else NativeRule
        return of_patches(
            settings,
            tokens={"image": token_id},
            layout=patch_layout(vision),
            patch=vision.patch_size,
            frames=vision.frames,
            axes=bool(model.decoder.rope_sections),
            defaults=IMAGE_PROCESSOR,
            video_defaults={},
            boxes=BOXES,
        )
    if isinstance(vision, HybridConfig):
        return PairRule(settings, token_id=token_id, sizes=vision.inputs, num_tokens=model.image_tokens)
    return FixedImage(
        settings,
        token_id=token_id,
        size=vision.inputs["pixel_values"],
        num_tokens=model.image_tokens,
        defaults={},
    )


@dataclass(frozen=True)
class AudioTokens:
    """Tokens of so many real frames: every position counts that has something of the clip."""

    encoder: AudioConfig
    projector: ProjectorConfig

    def __call__(self, frames: int) -> int:
        if self.projector.kind not in ("linear", "mlp"):
            return self.projector.num_tokens((self.encoder.num_positions, 1))
        return max(-(-self.encoder.positions_of(frames) // self.projector.merge[0]), 1)


def prepared(part: Part, audio_seconds: float = 0.0) -> Part:
    """The part with the sizes that its directory's settings make, where its encoder takes any.

    Args:
      audio_seconds: a window of an encoder of any number of frames; 0 for as long as its family has it.

    Raises UserError for towers that stand only in their own system.
    """
    config = part.config
    if isinstance(config, NativeViTConfig):
        if config.slot_patches:
            raise UserError(
                f"{part.opened.directory}: the tower of {part.opened.family.name} stands in its own system only"
            )
        config = dataclasses.replace(config, taps=())  # for the first layers of its own decoder
    elif isinstance(config, ViTConfig) and config.position_grid:
        rule = PixelRule.read(Settings.read(part.opened.directory).need("image"), {})
        height, width, _ = rule(np.zeros((64, 64, 3), np.uint8)).shape
        config = dataclasses.replace(config, height=height, width=width)
    elif isinstance(config, ConformerConfig) and audio_seconds:
        settings = Settings.read(part.opened.directory).need("audio")
        hop = 1 if config.num_mels == 1 else settings.get("hop_length", MEL["hop_length"])
        config = dataclasses.replace(config, max_frames=int(audio_seconds * RATE) // hop)
    return dataclasses.replace(part, config=config)
