"""The quickstart: encoders, language model, alignment, instruction tuning and DPO in minutes on two cores."""

from dataclasses import replace

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

# Scenes come most often: two minutes of training do not teach reading, but they teach to find and name things.
PICTURES = {"digits": 2.0, "numbers": 0.5, "ocr": 0.5, "charts": 0.7, "tables": 0.5, "scenes": 7.0}
SOUNDS = {"speech": 2.0, "sound_scenes": 0.7}
WORDS = {"text": 0.5, "dialogues": 1.0}


def get_config() -> RunConfig:
    model = MultimodalConfig(
        vision=ViTConfig(
            height=64, width=64, patch_size=8, embed_dim=128, num_layers=4, num_heads=4, mlp_dim=512,
            stem=(32, 64, 128), position_init="sincos",
        ),
        audio=AudioEncoderConfig(max_frames=160, embed_dim=128, num_layers=2, num_heads=4, mlp_dim=512),
        image_projector=ProjectorConfig(kind="mlp", hidden_dim=256),
        audio_projector=ProjectorConfig(kind="mlp", merge=(8, 1), hidden_dim=256),
        decoder=DecoderConfig(
            embed_dim=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=384, qk_norm=True,
            attention_start="mimetic",
        ),
        heads=HeadConfig(box_bins=64),
    )  # fmt: skip
    processor = ProcessorConfig(
        image=ImageRule(height=64, width=64, num_tokens=64),
        audio=AudioRule(max_frames=160, num_tokens=10, frames_per_token=16),
        targets=TargetRule(box_bins=64, image_grid=(8, 8), audio_positions=80),
        box_bins=64,
    )
    everything = {**PICTURES, **SOUNDS, **WORDS}
    muon = OptimizerConfig(kind="muon", learning_rate=5e-3)
    batch = BatchConfig(rows=4, length=416, images=5, audio=3)
    return RunConfig(
        name="quickstart",
        model=model,
        processor=processor,
        vocab_size=512,
        sources={kind: SourceConfig("tfds", f"mm_jax_quickstart/{kind}") for kind in KINDS},
        stages={
            "towers": Stage(
                steps=900,
                mixture={**PICTURES, **SOUNDS},
                trainable=("vision", "audio", "heads"),
                loss="dense",
                batch=BatchConfig(rows=8, length=288, images=4, audio=1),
                optimizer=replace(muon, learning_rate=8e-3),
            ),
            "language": Stage(
                steps=80,
                mixture=everything,
                trainable=("decoder",),
                media=False,
                batch=BatchConfig(rows=8, length=256),
                optimizer=muon,
            ),
            "align": Stage(
                steps=120,
                mixture={**PICTURES, **SOUNDS},
                trainable=(".*_projector",),
                naming=1.0,
                batch=batch,
                optimizer=muon,
            ),
            "instruct": Stage(
                steps=1900,
                mixture=everything,
                trainable=(".*_projector", "decoder"),
                answer_weight="answer",
                naming=0.1,
                batch=batch,
                optimizer=replace(muon, decay_fraction=0.4),
            ),
            "prefer": Stage(
                steps=60,
                mixture={"scenes": 1.0},
                trainable=(".*_projector", "decoder"),
                loss="preference",
                batch=BatchConfig(rows=8, length=384, images=2, audio=1, pairs=2),
                optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=5, weight_decay=0.0),
                preference=PreferenceConfig(tasks=("exists",), questions=1500, pairs=480),
            ),
        },
        checkpoint=CheckpointConfig(every_steps=500),
    )
