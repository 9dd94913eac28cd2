"""A whole run in miniature: real PNG and WAV files, chat JSONL, a model of a few thousand parameters."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "white")
TONES = {"low": 300.0, "high": 2000.0}

CONFIG = """
from mm_jax.data.audio import AudioRule
from mm_jax.data.image import ImageRule
from mm_jax.data.pipeline import BatchConfig
from mm_jax.data.processor import ProcessorConfig, TargetRule
from mm_jax.data.sources import SourceConfig
from mm_jax.models import AudioEncoderConfig, DecoderConfig, HeadConfig
from mm_jax.models import MultimodalConfig, ProjectorConfig, ViTConfig
from mm_jax.train.config import CheckpointConfig, OptimizerConfig, PreferenceConfig, RunConfig, Stage

ROOT = "{root}"


def get_config():
    media = BatchConfig(rows=2, length=96, images=4, audio=2, bins=4)
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=2)
    muon = OptimizerConfig("muon", learning_rate=1e-3, warmup_steps=2)
    sources = {{name: SourceConfig("chat", f"{{ROOT}}/{{name}}.jsonl") for name in ("pictures", "sounds")}}
    everything = {{"pictures": 2.0, "sounds": 1.0}}
    return RunConfig(
        name="tiny",
        model=MultimodalConfig(
            vision=ViTConfig(16, 16, patch_size=8, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16),
            audio=AudioEncoderConfig(max_frames=16, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16),
            image_projector=ProjectorConfig(merge=(2, 1), hidden_dim=16),
            audio_projector=ProjectorConfig(merge=(4, 1), hidden_dim=16),
            decoder=DecoderConfig(
                embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16
            ),
            heads=HeadConfig(box_bins=8),
        ),
        processor=ProcessorConfig(
            image=ImageRule(height=16, width=16, num_tokens=2),
            audio=AudioRule(max_frames=16, num_tokens=2, frames_per_token=8),
            targets=TargetRule(box_bins=8, image_grid=(2, 2), image_block=(2, 1), audio_positions=8),
            box_bins=8,
        ),
        vocab_size=320,
        sources=sources,
        stages={{
            "towers": Stage(
                steps=4, mixture=everything, trainable=("vision", "audio", "heads"), loss="dense",
                batch=media, optimizer=optimizer,
            ),
            "language": Stage(
                steps=4, mixture=everything, trainable=("decoder",), media=False, optimizer=optimizer,
                batch=BatchConfig(rows=2, length=96, bins=4),
            ),
            "align": Stage(
                steps=4, mixture=everything, trainable=(".*_projector",), batch=media, optimizer=muon,
                naming=1.0,
            ),
            "prefer": Stage(
                steps=4, mixture={{"pictures": 1.0}}, trainable=(".*_projector", "decoder"),
                loss="preference", optimizer=optimizer,
                batch=BatchConfig(rows=2, length=96, images=2, pairs=2, bins=4),
                preference=PreferenceConfig(tasks=("exists",), questions=24, pairs=10),
            ),
        }},
        log_every=1,
        checkpoint=CheckpointConfig(every_steps=2),
    )
"""


def write_data(root: Path) -> None:
    """12 pictures with two questions each and 6 tones, as chat JSONL beside their files."""
    lines = []
    for index in range(12):
        colour = COLOURS[index % 4]
        picture = Image.new("RGB", (24, 20), "black")
        ImageDraw.Draw(picture).rectangle((4, 4, 12, 12), fill=colour)
        picture.save(root / f"{index}.png")
        asked = COLOURS[(index // 4) % 4]
        image = {"type": "image", "image": f"{index}.png"}
        image["regions"] = [{"label": f"{colour} square", "box": [4, 4, 13, 13]}]
        first = [image, {"type": "text", "text": "which colour is it?"}]
        lines.append(
            [
                {"role": "user", "content": first},
                {"role": "assistant", "content": colour, "task": "colour"},
                {"role": "user", "content": f"is there a {asked} square?"},
                {"role": "assistant", "content": "yes" if asked == colour else "no", "task": "exists"},
            ]
        )
    _write(root / "pictures.jsonl", lines)
    lines = []
    for index in range(6):
        name = list(TONES)[index % 2]
        wave = 0.3 * np.sin(2 * np.pi * TONES[name] * np.arange(2000) / 16_000)
        soundfile.write(root / f"{index}.wav", wave.astype(np.float32), 16_000, subtype="PCM_16")
        audio = {"type": "audio", "audio": f"{index}.wav", "regions": [{"label": name, "box": [0.0, 0.12]}]}
        question = [audio, {"type": "text", "text": "high or low?"}]
        lines.append(
            [{"role": "user", "content": question}, {"role": "assistant", "content": name, "task": "tone"}]
        )
    _write(root / "sounds.jsonl", lines)


def _write(path: Path, conversations: list) -> None:
    lines = [json.dumps({"id": f"{path.stem}-{i}", "messages": m}) for i, m in enumerate(conversations)]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file over a data directory of its own."""
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    path = root / "tiny.py"
    path.write_text(CONFIG.format(root=root))
    return path
