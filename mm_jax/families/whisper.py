"""The encoder of Whisper (reference: that of WhisperModel), and the table of weights of encoders shaped like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mm_jax.errors import UserError
from mm_jax.families.family import CONV, Family, System, Weight, linear, norm
from mm_jax.families.fields import Fields
from mm_jax.models import AudioEncoderConfig

DEFAULTS = {
    "num_mel_bins": 80,
    "d_model": 384,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "max_source_positions": 1500,
    "activation_function": "gelu",
}
RENAMES = ((r"^model\.", ""),)
# what belongs to the decoder, to training or to generation; scale_embedding is read and not used in the reference
OTHERS = """
    vocab_size decoder_layers decoder_attention_heads decoder_ffn_dim decoder_layerdrop decoder_start_token_id
    encoder_layerdrop activation_dropout init_std max_target_positions suppress_tokens begin_suppress_tokens
    forced_decoder_ids use_weighted_layer_sum classifier_proj_size apply_spec_augment mask_time_prob mask_time_length
    mask_time_min_masks mask_feature_prob mask_feature_length mask_feature_min_masks median_filter_width max_length
    num_hidden_layers scale_embedding
""".split()


def encoder(values: Mapping[str, Any], where: str, **options: Any) -> AudioEncoderConfig:
    """Reads the fields of an encoder; `options` are those of `AudioEncoderConfig`."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip(*OTHERS)
    config = AudioEncoderConfig(
        num_mels=fields("num_mel_bins"),
        max_frames=2 * fields("max_source_positions"),
        embed_dim=fields("d_model"),
        num_layers=fields("encoder_layers"),
        num_heads=fields("encoder_attention_heads"),
        mlp_dim=fields("encoder_ffn_dim"),
        activation=fields.activation("activation_function"),
        conv_activation="gelu",
        positions="learned",
        key_bias=False,
        mask_frames=False,
        **options,
    )
    fields.finish()
    return config


def weights(theirs: str = "", ours: str = "") -> tuple[Weight, ...]:
    """The tensors of an encoder whose names begin with `theirs` and whose paths begin with `ours`."""
    layer, block = f"{theirs}layers.{{}}.", f"{ours}layers/"
    return (
        *linear(f"{theirs}conv1", f"{ours}conv1", pattern=CONV),
        *linear(f"{theirs}conv2", f"{ours}conv2", pattern=CONV),
        Weight(f"{theirs}embed_positions.weight", f"{ours}positions"),
        *norm(f"{layer}self_attn_layer_norm", f"{block}attention_norm"),
        *linear(f"{layer}self_attn.q_proj", f"{block}attention/query"),
        *linear(f"{layer}self_attn.k_proj", f"{block}attention/key", bias=False),
        *linear(f"{layer}self_attn.v_proj", f"{block}attention/value"),
        *linear(f"{layer}self_attn.out_proj", f"{block}attention/out"),
        *norm(f"{layer}final_layer_norm", f"{block}mlp_norm"),
        *linear(f"{layer}fc1", f"{block}mlp/up"),
        *linear(f"{layer}fc2", f"{block}mlp/down"),
        *norm(f"{theirs}layer_norm", f"{ours}norm"),
    )


def inputs(config: AudioEncoderConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """input_features [n, mels, frames] as the encoder takes them. All frames count, as in the reference: attention_mask
    is accepted and changes nothing. Raises UserError for windows of another size."""
    values = arrays["input_features"]
    if values.ndim != 3 or values.shape[1:] != (config.num_mels, config.max_frames):
        raise UserError(
            f"input_features has shape {list(values.shape)}, [clips, {config.num_mels}, {config.max_frames}] is needed"
        )
    frames = np.full(len(values), config.max_frames, np.int32)
    return {"audio_values": np.ascontiguousarray(values.transpose(0, 2, 1)), "audio_frames": frames}


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    config = encoder(values, "config.json")
    return System(
        config,
        weights("encoder."),
        unused=("decoder.*", "proj_out.*"),
        inputs=inputs,
        takes=("input_features", "attention_mask"),
    )


FAMILY = Family("whisper", ("audio",), _system, RENAMES)
