"""Qwen2-Audio (reference: Qwen2AudioForConditionalGeneration): Whisper's encoder with means over pairs of positions, a
linear map, Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.data.mel_rule import MelAudio
from mm_jax.families import whisper
from mm_jax.families.family import Family, System, linear
from mm_jax.families.fields import Fields
from mm_jax.families.parts import read_text
from mm_jax.models import AudioEncoderConfig, MultimodalConfig, ProjectorConfig

DEFAULTS = {"audio_token_index": 151_646, "audio_config": {}, "text_config": {}}
ENCODER = {
    "num_mel_bins": 128,
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
}
RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (
        r"^language_model\.model\.model\.",
        "language_model.model.",
    ),  # written by some versions of the reference
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(audio_tower|multi_modal_projector)\.", r"\1."),
)
# the reference's, for checkpoints without one
TEMPLATE = (
    "{% set audio_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if 'audio' in content or 'audio_url' in content or message['type'] == 'audio' or content['type'] == 'audio' %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}"
    "{{ content['text'] }}"
    "{% endif %}"
    "{% endfor %}"
    "<|im_end|>\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n"
    "{% endif %}"
)


def encoder(values: Mapping[str, Any], where: str) -> AudioEncoderConfig:
    """See `mm_jax.families.whisper.encoder`."""
    return whisper.encoder(ENCODER | dict(values), where, pool=2)


def _encoder(values: Mapping[str, Any], names: frozenset[str]) -> System:
    config = encoder(values, "config.json")
    takes = ("input_features", "attention_mask")
    return System(config, whisper.weights(), inputs=whisper.inputs, takes=takes)


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    if "audio_token_id" in values:  # another name of the same field
        values = {"audio_token_index": values["audio_token_id"], **values}
    fields = Fields(values, DEFAULTS)
    fields.skip("audio_token_id", "vocab_size", "hidden_size")
    audio = encoder(fields("audio_config"), "config.json: audio_config")
    tied = "language_model.lm_head.weight" not in names
    text = read_text({"model_type": "qwen2", **fields("text_config")}, tied)
    token = fields("audio_token_index")
    fields.finish()
    config = MultimodalConfig(
        None, audio, audio_projector=ProjectorConfig("linear", norm=False), decoder=text.decoder
    )
    table = (
        *whisper.weights("audio_tower.", "audio/"),
        *linear("multi_modal_projector.linear", "audio_projector/out"),
        *text.table("language_model.model.", "language_model.lm_head."),
    )
    rule = partial(
        MelAudio,
        token_id=token,
        shape=(audio.num_mels, audio.max_frames),
        num_tokens=config.audio_tokens,
        tokens_of=audio.positions_of,
    )
    return System(config, table, text, rule=rule, template=TEMPLATE)


FAMILY = Family("qwen2_audio", ("text", "audio"), _system, RENAMES)
ENCODER_FAMILY = Family("qwen2_audio_encoder", ("audio",), _encoder)
