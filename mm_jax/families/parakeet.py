"""The encoder of Parakeet (reference: ParakeetEncoder, and that of ParakeetForCTC): a Fast Conformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mm_jax.errors import UserError
from mm_jax.families.family import Family, System, Weight, linear
from mm_jax.families.fields import Fields
from mm_jax.families.wav2vec2_conformer import block, frames_of
from mm_jax.models import ConformerConfig, MelSubsampling

DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "intermediate_size": 4096,
    "hidden_act": "silu",
    "attention_bias": True,
    "convolution_bias": True,
    "conv_kernel_size": 9,
    "subsampling_factor": 8,
    "subsampling_conv_channels": 256,
    "subsampling_conv_kernel_size": 3,
    "subsampling_conv_stride": 2,
    "num_mel_bins": 80,
    "scale_input": True,
}
OTHERS = "num_key_value_heads dropout_positions layerdrop activation_dropout max_position_embeddings".split()
NAMES = {
    "first_mlp_norm": "norm_feed_forward1",
    "first_mlp/up": "feed_forward1.linear1",
    "first_mlp/down": "feed_forward1.linear2",
    "attention_norm": "norm_self_att",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/place": "self_attn.relative_k_proj",
    "attention/content_bias": "self_attn.bias_u",
    "attention/place_bias": "self_attn.bias_v",
    "convolution_norm": "norm_conv",
    "convolution/gate": "conv.pointwise_conv1",
    "convolution/depthwise": "conv.depthwise_conv",
    "convolution/norm": "conv.norm",
    "convolution/out": "conv.pointwise_conv2",
    "second_mlp_norm": "norm_feed_forward2",
    "second_mlp/up": "feed_forward2.linear1",
    "second_mlp/down": "feed_forward2.linear2",
    "out_norm": "norm_out",
}
UNUSED = ("*.num_batches_tracked",)
WINDOW = 3000  # frames of a slot, 30 s, where this encoder is put in front of a decoder


def encoder(values: Mapping[str, Any], where: str) -> ConformerConfig:
    """Reads the config of an encoder. Raises UserError for what is not supported."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip(*OTHERS)
    front = MelSubsampling(
        fields("subsampling_factor"),
        fields("subsampling_conv_channels"),
        fields("subsampling_conv_kernel_size"),
    )
    if fields("subsampling_conv_stride") != 2:
        raise fields.unsupported("subsampling_conv_stride", "2 is")
    if front.kernel_size % 2 == 0:
        raise fields.unsupported("subsampling_conv_kernel_size", "odd sizes are")
    if front.factor != 2**front.num_layers:
        raise fields.unsupported("subsampling_factor", "powers of two are")
    config = ConformerConfig(
        num_mels=fields("num_mel_bins"),
        max_frames=WINDOW,
        front=front,
        embed_dim=fields("hidden_size"),
        num_layers=fields("num_hidden_layers"),
        num_heads=fields("num_attention_heads"),
        mlp_dim=fields("intermediate_size"),
        kernel_size=fields("conv_kernel_size"),
        activation=fields.activation("hidden_act"),
        use_bias=fields("attention_bias"),
        conv_bias=fields("convolution_bias"),
        conv_norm="batch",
        scale_input=fields("scale_input"),
    )
    fields.finish()
    return config


def weights(config: ConformerConfig, theirs: str = "", ours: str = "") -> tuple[Weight, ...]:
    """The tensors of an encoder whose names begin with `theirs` and whose paths begin with `ours`."""
    layers, flat = f"{theirs}subsampling.layers", "o i a b -> a b i o"
    front = linear(f"{layers}.0", f"{ours}front/conv", pattern=flat)
    for k in range(1, config.front.num_layers):  # a ReLU stands between two of them and counts as a layer
        front += linear(f"{layers}.{3 * k - 1}", f"{ours}front/depthwise{k}", pattern=flat)
        front += linear(f"{layers}.{3 * k}", f"{ours}front/pointwise{k}", pattern=flat)
    return (
        *front,
        *linear(f"{theirs}subsampling.linear", f"{ours}input"),
        *block(config, NAMES, f"{theirs}layers.{{}}.", f"{ours}layers/"),
    )


def inputs(config: ConformerConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """input_features [n, frames, mels] and attention_mask, the frames of each clip, as the encoder takes them."""
    values = arrays["input_features"]
    if values.ndim != 3 or values.shape[2] != config.num_mels:
        raise UserError(
            f"input_features has shape {list(values.shape)}, [clips, frames, {config.num_mels}] is needed"
        )
    return {"audio_values": values, "audio_frames": frames_of(values, arrays.get("attention_mask"))}


TAKES = ("input_features", "attention_mask")


def _encoder(values: Mapping[str, Any], names: frozenset[str]) -> System:
    config = encoder(values, "config.json")
    return System(config, weights(config), unused=UNUSED, inputs=inputs, takes=TAKES)


def _ctc(values: Mapping[str, Any], names: frozenset[str]) -> System:
    fields = Fields(values, {"encoder_config": {}})
    fields.skip("vocab_size", "ctc_loss_reduction", "ctc_zero_infinity")
    config = encoder(fields("encoder_config"), "config.json: encoder_config")
    fields.finish()
    unused = (*UNUSED, "ctc_head.*")
    return System(config, weights(config, "encoder."), unused=unused, inputs=inputs, takes=TAKES)


FAMILY = Family("parakeet_encoder", ("audio",), _encoder)
CTC = Family("parakeet_ctc", ("audio",), _ctc)
