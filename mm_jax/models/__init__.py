"""Flax modules of the zoo: pure functions of (params, arrays). They know jax, flax and einops only."""

from mm_jax.models.attention import attention, attention_mask, attention_weights
from mm_jax.models.audio import AudioEncoder, AudioEncoderConfig
from mm_jax.models.decoder import Decoder, DecoderConfig, init_cache
from mm_jax.models.heads import DenseHeads, HeadConfig
from mm_jax.models.layers import MLP, Attention, EncoderBlock
from mm_jax.models.multimodal import MultimodalConfig, MultimodalLM, splice
from mm_jax.models.projectors import MLPProjector, ProjectorConfig, Resampler
from mm_jax.models.vision import VisionTransformer, ViTConfig

__all__ = [
    "MLP", "Attention", "AudioEncoder", "AudioEncoderConfig", "Decoder", "DecoderConfig", "DenseHeads", "EncoderBlock",
    "HeadConfig", "MLPProjector", "MultimodalConfig", "MultimodalLM", "ProjectorConfig", "Resampler", "ViTConfig",
    "VisionTransformer", "attention", "attention_mask", "attention_weights", "init_cache", "splice",
]  # fmt: skip
