"""Voxtral (reference: VoxtralForConditionalGeneration): Whisper's encoder, an MLP over four positions each, Llama."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mm_jax.data.mel_rule import MelAudio
from mm_jax.families import qwen2_audio, whisper
from mm_jax.families.family import Family, System, linear
from mm_jax.families.fields import Fields
from mm_jax.families.parts import read_text
from mm_jax.models import AudioEncoderConfig, MultimodalConfig, ProjectorConfig

DEFAULTS = {"audio_token_id": None, "projector_hidden_act": "gelu", "audio_config": {}, "text_config": {}}
# the encoder's fields have two names
NAMES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads",
    "intermediate_size": "encoder_ffn_dim",
    "layerdrop": "encoder_layerdrop",
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 131_072,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 30,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "head_dim": 128,
}
RENAMES = qwen2_audio.RENAMES


def encoder(values: Mapping[str, Any], where: str) -> AudioEncoderConfig:
    """See `mm_jax.families.whisper.encoder`."""
    return whisper.encoder(qwen2_audio.ENCODER | {NAMES.get(k, k): v for k, v in values.items()}, where)


def _encoder(values: Mapping[str, Any], names: frozenset[str]) -> System:
    config = encoder(values, "config.json")
    takes = ("input_features", "attention_mask")
    return System(config, whisper.weights(), inputs=whisper.inputs, takes=takes)


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    fields = Fields(values, DEFAULTS)
    fields.skip("vocab_size", "hidden_size")
    audio = encoder(fields("audio_config"), "config.json: audio_config")
    tied = "language_model.lm_head.weight" not in names
    given = TEXT | dict(fields("text_config"))
    if not {"rope_theta", "rope_parameters"} & given.keys():
        given["rope_theta"] = 1e8
    text = read_text(given, tied)
    # the width of the encoder's MLP is read as that of the positions which are laid side by side
    merge, rest = divmod(audio.mlp_dim, audio.embed_dim)
    if rest or audio.num_positions % merge:
        raise fields.unsupported(
            "audio_config", f"{audio.num_positions} positions do not make rows of {audio.mlp_dim} channels"
        )
    projector = ProjectorConfig(
        "mlp",
        (merge, 1),
        hidden_dim=text.decoder.embed_dim,
        activation=fields.activation("projector_hidden_act"),
        norm=False,
        use_bias=False,
    )
    token = fields("audio_token_id")
    if token is None:
        raise fields.unsupported("audio_token_id", "a number is needed")
    fields.finish()
    config = MultimodalConfig(None, audio, audio_projector=projector, decoder=text.decoder)
    table = (
        *whisper.weights("audio_tower.", "audio/"),
        *linear("multi_modal_projector.linear_1", "audio_projector/hidden", bias=False),
        *linear("multi_modal_projector.linear_2", "audio_projector/out", bias=False),
        *text.table("language_model.model.", "language_model.lm_head."),
    )
    shape = (audio.num_mels, audio.max_frames)
    rule = partial(MelAudio, token_id=token, shape=shape, num_tokens=config.audio_tokens)
    return System(config, table, text, rule=rule)


FAMILY = Family("voxtral", ("text", "audio"), _system, RENAMES)
ENCODER_FAMILY = Family("voxtral_encoder", ("audio",), _encoder)
