"""wav2vec 2.0 with Conformer blocks (reference: Wav2Vec2ConformerModel): an encoder of waveforms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mm_jax.errors import UserError
from mm_jax.families.family import CONV, POINT, Family, System, Weight, linear, norm
from mm_jax.families.fields import Fields
from mm_jax.models import ConformerConfig, WaveformConvolutions

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "conv_dim": [512] * 7,
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_bias": False,
    "position_embeddings_type": "relative",
    "rotary_embedding_base": 10_000,
    "conv_depthwise_kernel_size": 31,
}
RENAMES = ((r"^wav2vec2_conformer\.", ""),)
# of dropout, pre-training, heads for other tasks, and of position convolutions that the reference never calls
OTHERS = """
    vocab_size activation_dropout feat_proj_dropout feat_quantizer_dropout final_dropout layerdrop
    conformer_conv_dropout num_conv_pos_embeddings num_conv_pos_embedding_groups apply_spec_augment mask_time_prob
    mask_time_length mask_time_min_masks mask_feature_prob mask_feature_length mask_feature_min_masks
    num_codevectors_per_group num_codevector_groups contrastive_logits_temperature num_negatives codevector_dim
    proj_codevector_dim diversity_loss_weight ctc_loss_reduction ctc_zero_infinity use_weighted_layer_sum
    classifier_proj_size tdnn_dim tdnn_kernel tdnn_dilation xvector_output_dim adapter_kernel_size adapter_stride
    num_adapter_layers output_hidden_size max_source_positions num_feat_extract_layers
""".split()
UNUSED = (
    "masked_spec_embed", "encoder.pos_conv_embed.*", "encoder.embed_positions.*", "*.num_batches_tracked",
    "quantizer.*", "project_hid.*", "project_q.*", "lm_head.*", "projector.*", "classifier.*", "feature_extractor2.*",
    "tdnn.*", "objective.*", "layer_weights",
)  # fmt: skip
RELATIVE = ("attention/place", "attention/content_bias", "attention/place_bias")
NAMES = {
    "first_mlp_norm": "ffn1_layer_norm",
    "first_mlp/up": "ffn1.intermediate_dense",
    "first_mlp/down": "ffn1.output_dense",
    "attention_norm": "self_attn_layer_norm",
    "attention/query": "self_attn.linear_q",
    "attention/key": "self_attn.linear_k",
    "attention/value": "self_attn.linear_v",
    "attention/out": "self_attn.linear_out",
    "attention/place": "self_attn.linear_pos",
    "attention/content_bias": "self_attn.pos_bias_u",
    "attention/place_bias": "self_attn.pos_bias_v",
    "convolution_norm": "conv_module.layer_norm",
    "convolution/gate": "conv_module.pointwise_conv1",
    "convolution/depthwise": "conv_module.depthwise_conv",
    "convolution/norm": "conv_module.batch_norm",
    "convolution/out": "conv_module.pointwise_conv2",
    "second_mlp_norm": "ffn2_layer_norm",
    "second_mlp/up": "ffn2.intermediate_dense",
    "second_mlp/down": "ffn2.output_dense",
    "out_norm": "final_layer_norm",
}
WINDOW = 30 * 16_000  # samples of a slot, where this encoder is put in front of a decoder


def encoder(values: Mapping[str, Any], where: str) -> ConformerConfig:
    """Reads a config. Raises UserError for what is not supported."""
    fields = Fields(values, DEFAULTS, where)
    fields.skip(*OTHERS)
    norms = {"group": "first", "layer": "every"}
    kinds = {"relative": "relative", "rotary": "rotary", None: "none"}
    if (kind := fields("feat_extract_norm")) not in norms:
        raise fields.unsupported("feat_extract_norm")
    if (positions := fields("position_embeddings_type")) not in kinds:
        raise fields.unsupported("position_embeddings_type")
    front = WaveformConvolutions(
        *(tuple(fields(name)) for name in ("conv_dim", "conv_kernel", "conv_stride")),
        norm=norms[kind],
        activation=fields.activation("feat_extract_activation"),
        use_bias=fields("conv_bias"),
    )
    if not len(front.channels) == len(front.kernels) == len(front.strides):
        raise fields.unsupported("conv_dim", "as many as in conv_kernel and conv_stride are needed")
    config = ConformerConfig(
        num_mels=1,
        max_frames=WINDOW,
        front=front,
        embed_dim=fields("hidden_size"),
        num_layers=fields("num_hidden_layers"),
        num_heads=fields("num_attention_heads"),
        mlp_dim=fields("intermediate_size"),
        kernel_size=fields("conv_depthwise_kernel_size"),
        activation=fields.activation("hidden_act"),
        positions=kinds[positions],
        rope_theta=float(fields("rotary_embedding_base")),
        conv_bias=False,
        conv_norm="batch",
        input_norm=True,
        final_norm=True,
        norm_eps=fields("layer_norm_eps"),
    )
    fields.finish()  # add_adapter among them
    return config


def weights(config: ConformerConfig, theirs: str = "", ours: str = "") -> tuple[Weight, ...]:
    """The tensors of an encoder whose names begin with `theirs` and whose paths begin with `ours`."""
    front: list[Weight] = []
    for k in range(len(config.front.channels)):
        conv = f"{theirs}feature_extractor.conv_layers.{k}"
        front += linear(f"{conv}.conv", f"{ours}front/conv{k}", bias=config.front.use_bias, pattern=CONV)
        if config.front.norm == "every" or k == 0:
            front += norm(f"{conv}.layer_norm", f"{ours}front/norm{k}")
    return (
        *front,
        *norm(f"{theirs}feature_projection.layer_norm", f"{ours}input_norm"),
        *linear(f"{theirs}feature_projection.projection", f"{ours}input"),
        *block(config, NAMES, f"{theirs}encoder.layers.{{}}.", f"{ours}layers/"),
        *norm(f"{theirs}encoder.layer_norm", f"{ours}norm"),
    )


def block(config: ConformerConfig, names: Mapping[str, str], theirs: str, ours: str) -> list[Weight]:
    """The tensors of the blocks; `names` holds theirs by our paths, see `NAMES`."""
    table: list[Weight] = []
    for path, name in names.items():
        name, to = theirs + name, ours + path
        if path in RELATIVE and config.positions != "relative":
            continue
        if path.endswith("norm"):
            table += norm(name, to)
        elif path in ("attention/content_bias", "attention/place_bias"):
            table.append(Weight(name, to))
        elif path.startswith("convolution/"):
            pattern = CONV if path == "convolution/depthwise" else POINT
            table += linear(name, to, bias=config.conv_bias, pattern=pattern)
        else:
            table += linear(name, to, bias=config.use_bias and path != "attention/place")
    batch = names["convolution/norm"]
    for name, to in (("running_mean", "mean"), ("running_var", "var")):
        table.append(Weight(f"{theirs}{batch}.{name}", f"{ours}convolution/norm/{to}"))
    return table


def inputs(config: ConformerConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """input_values [n, samples] and attention_mask, the samples of each clip, as the encoder takes them."""
    values = arrays["input_values"]
    if values.ndim != 2 or config.positions_of(values.shape[1]) < 1:
        raise UserError(f"input_values has shape {list(values.shape)}, [clips, samples] is needed")
    return {
        "audio_values": values[..., None],
        "audio_frames": frames_of(values, arrays.get("attention_mask")),
    }


def frames_of(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """int32 [n], the real frames of each row: those of a mask [n, frames] that has its zeros at the end.

    Raises UserError for another mask.
    """
    rows, length = values.shape[:2]
    if mask is None:
        return np.full(rows, length, np.int32)
    real = np.asarray(mask).astype(bool)
    frames = real.sum(axis=-1).astype(np.int32)
    if real.shape != (rows, length) or (real != (np.arange(length) < frames[:, None])).any():
        raise UserError(f"attention_mask must be [{rows}, {length}] with its zeros at the end of the rows")
    return frames


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    config = encoder(values, "config.json")
    takes = ("input_values", "attention_mask")
    return System(config, weights(config), unused=UNUSED, inputs=inputs, takes=takes)


FAMILY = Family("wav2vec2-conformer", ("audio",), _system, RENAMES)
