"""The quickstart: encoders, language model, alignment, instruction tuning and DPO in minutes on two cores."""

from mm_jax.data.audio import AudioRule
from mm_jax.data.image import ImageRule
from mm_jax.data.pipeline import BatchConfig
from mm_jax.data.processor import ProcessorConfig, TargetRule
from mm_jax.data.sources import SourceConfig
from mm_jax.models import (
    AudioEncoderConfig,
    DecoderConfig,
    HeadConfig,
    MultimodalConfig,
    ProjectorConfig,
    ViTConfig,
)
from mm_jax.train.config import CheckpointConfig, OptimizerConfig, PreferenceConfig, RunConfig, Stage

KINDS = (
    "digits",
    "numbers",
    "ocr",
    "charts",
    "tables",
    "scenes",
    "speech",
    "sound_scenes",
    "text",
    "dialogues",
)

PICTURES = {"digits": 2.0, "numbers": 1.0, "ocr": 1.0, "charts": 1.0, "tables": 1.0, "scenes": 4.0}
SOUNDS = {"speech": 2.0, "sound_scenes": 1.0}
WORDS = {"text": 1.0, "dialogues": 1.0}


def get_config() -> RunConfig:
    model = MultimodalConfig(
        vision=ViTConfig(
            height=64, width=64, patch_size=8, embed_dim=128, num_layers=4, num_heads=4, mlp_dim=512
        ),
        audio=AudioEncoderConfig(max_frames=160, embed_dim=128, num_layers=2, num_heads=4, mlp_dim=512),
        image_projector=ProjectorConfig(kind="mlp", merge=(2, 2), hidden_dim=256),
        audio_projector=ProjectorConfig(kind="mlp", merge=(8, 1), hidden_dim=256),
        decoder=DecoderConfig(
            embed_dim=192, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=32, mlp_dim=512
        ),
        heads=HeadConfig(box_bins=64),
    )
    processor = ProcessorConfig(
        image=ImageRule(height=64, width=64, num_tokens=16),
        audio=AudioRule(max_frames=160, num_tokens=10, frames_per_token=16),
        targets=TargetRule(box_bins=64, image_grid=(8, 8), audio_positions=80),
        box_bins=64,
    )
    everything = {**PICTURES, **SOUNDS, **WORDS}
    batch = BatchConfig(rows=8, length=256, images=6, audio=4)
    return RunConfig(
        name="quickstart",
        model=model,
        processor=processor,
        vocab_size=1024,
        sources={kind: SourceConfig("tfds", f"mm_jax_quickstart/{kind}") for kind in KINDS},
        stages={
            "towers": Stage(
                steps=400,
                mixture={**PICTURES, **SOUNDS},
                trainable=("vision", "audio", "heads"),
                loss="dense",
                batch=BatchConfig(rows=8, length=128, images=6, audio=3),
            ),
            "language": Stage(
                steps=200,
                mixture=everything,
                trainable=("decoder",),
                media=False,
                batch=BatchConfig(rows=8, length=256),
            ),
            "align": Stage(
                steps=150,
                mixture={**PICTURES, **SOUNDS},
                trainable=(".*_projector",),
                batch=batch,
            ),
            "instruct": Stage(
                steps=700,
                mixture=everything,
                trainable=(".*_projector", "decoder"),
                batch=batch,
            ),
            "prefer": Stage(
                steps=40,
                mixture={"scenes": 1.0},
                trainable=(".*_projector", "decoder"),
                loss="preference",
                batch=BatchConfig(rows=8, length=128, images=2, audio=1, pairs=2),
                optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=5, weight_decay=0.0),
                preference=PreferenceConfig(tasks=("exists",), questions=600, pairs=160),
            ),
        },
        checkpoint=CheckpointConfig(every_steps=500),
    )
