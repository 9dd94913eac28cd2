"""Flax modules of the zoo: pure functions of (params, arrays). They know jax, flax and einops only."""

from mm_jax.models.attention import Mask, attention, attention_mask, attention_weights, row_mask, window_mask
from mm_jax.models.audio import AudioEncoder, AudioEncoderConfig
from mm_jax.models.conformer import Conformer, ConformerConfig, MelSubsampling, WaveformConvolutions
from mm_jax.models.cross import Context, CrossBlock
from mm_jax.models.decoder import Decoder, DecoderConfig, init_cache
from mm_jax.models.delta import DeltaConfig, GatedDelta, Texts, gated_delta
from mm_jax.models.encoders import (
    ENCODERS,
    AudioConfig,
    EncoderConfig,
    VisionConfig,
    dummy_inputs,
    encoder,
    slot_arrays,
)
from mm_jax.models.execution import Execution
from mm_jax.models.experts import ExpertConfig, Experts
from mm_jax.models.heads import DenseHeads, HeadConfig
from mm_jax.models.layers import MLP, Attention, EncoderBlock
from mm_jax.models.multimodal import MultimodalConfig, MultimodalLM, dummy_batch, splice
from mm_jax.models.native import NativeViT, NativeViTConfig
from mm_jax.models.projectors import (
    BranchProjector,
    LatentReader,
    MLPProjector,
    ProjectorConfig,
    QFormer,
    Resampler,
)
from mm_jax.models.rotary import RopeScaling, axial_rotation, channel_axes, rotate, rotation
from mm_jax.models.sam import HybridConfig, HybridEncoder, SamConfig, SamEncoder
from mm_jax.models.tiles import TiledViT, TiledViTConfig
from mm_jax.models.vision import VisionTransformer, ViTConfig

__all__ = [
    "ENCODERS", "MLP", "Attention", "AudioConfig", "AudioEncoder", "AudioEncoderConfig", "BranchProjector",
    "Conformer", "ConformerConfig", "Context", "CrossBlock", "Decoder", "DecoderConfig", "DeltaConfig", "DenseHeads",
    "EncoderBlock", "EncoderConfig", "Execution", "ExpertConfig", "Experts", "GatedDelta", "HeadConfig",
    "HybridConfig", "HybridEncoder", "LatentReader", "MLPProjector", "Mask", "MelSubsampling", "MultimodalConfig",
    "MultimodalLM", "NativeViT", "NativeViTConfig", "ProjectorConfig", "QFormer", "Resampler", "RopeScaling",
    "SamConfig", "SamEncoder", "Texts", "TiledViT", "TiledViTConfig", "ViTConfig", "VisionConfig", "VisionTransformer",
    "WaveformConvolutions", "attention", "attention_mask", "attention_weights", "axial_rotation", "channel_axes",
    "dummy_batch", "dummy_inputs", "encoder", "gated_delta", "init_cache", "rotate", "rotation", "row_mask",
    "slot_arrays", "splice", "window_mask",
]  # fmt: skip
