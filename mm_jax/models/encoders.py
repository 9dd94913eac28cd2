"""Which module encodes what a config describes."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mm_jax.models.audio import AudioEncoder, AudioEncoderConfig
from mm_jax.models.conformer import Conformer, ConformerConfig
from mm_jax.models.execution import Execution
from mm_jax.models.native import NativeViT, NativeViTConfig
from mm_jax.models.sam import HybridConfig, HybridEncoder, SamConfig, SamEncoder
from mm_jax.models.tiles import TiledViT, TiledViTConfig
from mm_jax.models.vision import VisionTransformer, ViTConfig

VisionConfig = ViTConfig | NativeViTConfig | SamConfig | HybridConfig | TiledViTConfig
AudioConfig = AudioEncoderConfig | ConformerConfig
EncoderConfig = VisionConfig | AudioConfig

ENCODERS: dict[type, type[nn.Module]] = {
    ViTConfig: VisionTransformer,
    NativeViTConfig: NativeViT,
    SamConfig: SamEncoder,
    HybridConfig: HybridEncoder,
    TiledViTConfig: TiledViT,
    AudioEncoderConfig: AudioEncoder,
    ConformerConfig: Conformer,
}


def encoder(
    config: EncoderConfig, dtype: jnp.dtype = jnp.float32, execution: Execution = Execution()
) -> nn.Module:
    """The encoder of a config."""
    return ENCODERS[type(config)](config, dtype, execution)


def slot_arrays(config: VisionConfig) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """(name, shape, dtype) of what an encoder of pictures takes of one slot of a batch, in the order of its arguments;
    not of one of native resolution."""
    if isinstance(config, TiledViTConfig):
        return config.arrays
    return tuple((name, (*size, 3), "float32") for name, size in config.inputs.items())


def dummy_inputs(config: EncoderConfig) -> dict[str, np.ndarray]:
    """What an encoder reads of a batch, for one picture or one window of sound, in the order of its arguments."""
    if isinstance(config, AudioConfig):
        values = np.zeros((1, config.max_frames, config.num_mels), np.float32)
        return {"audio_values": values, "audio_frames": np.full(1, config.max_frames, np.int32)}
    if not isinstance(config, NativeViTConfig):
        return {name: np.zeros((1, *shape), dtype) for name, shape, dtype in slot_arrays(config)}
    slots = (1, config.slot_patches) if config.slot_patches else (config.block,)
    arrays = {
        "patches": np.zeros((*slots, config.patch_dim), np.float32),
        "patch_segment_ids": np.ones(slots, np.int32),
        "patch_positions": np.zeros((*slots, 2), np.int32),
    }
    if config.smooth_table:
        arrays["patch_table_weights"] = np.zeros((*slots, 2, config.table_side), np.float32)
    elif config.table_side:
        arrays["patch_table_weights"] = np.zeros((*slots, 4), np.float32)
        arrays["patch_table_index"] = np.zeros((*slots, 4), np.int32)
    return arrays
