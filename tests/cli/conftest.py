"""A run directory with random weights, as `train` leaves one, and questions with files beside them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mm_jax.checkpoint.run import StageCheckpoints
from mm_jax.data.pipeline import BatchConfig
from mm_jax.data.processor import Processor
from mm_jax.data.sources import SourceConfig
from mm_jax.models import MultimodalConfig
from mm_jax.train.config import RunConfig, Stage, save_config
from tests.tiny import clip, picture, tiny


def make_run(path: Path, **options: bool) -> Path:
    return write_run(path, *tiny(**options))


def write_run(path: Path, config: MultimodalConfig, params: dict[str, Any], processor: Processor) -> Path:
    path.mkdir()
    stage = Stage(1, {"none": 1.0}, (".*",), BatchConfig(rows=1, length=64))
    sources = {"none": SourceConfig("chat", "none.jsonl")}
    save_config(RunConfig(path.name, config, processor.config, sources, {"only": stage}), path)
    processor.save(path / "processor")
    checkpoints = StageCheckpoints(path, "only")
    checkpoints.save(1, params, {"count": np.zeros(1)}, {}, {}, loss=1.0)
    checkpoints.wait()
    checkpoints.close()
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("runs") / "tiny"))


@pytest.fixture(scope="session")
def blind_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("runs") / "blind", vision=False, audio=False))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for k in range(2):
        picture(k).save(root / f"{k}.png")
        soundfile.write(root / f"{k}.wav", clip(k), 16_000)
    (root / "text.png").write_text("not a picture")
    image, audio = {"type": "image", "image": "0.png"}, {"type": "audio", "audio": "1.wav"}
    ask = {"type": "text", "text": "what colour"}
    lines = [
        {
            "id": "a",
            "messages": [
                {"role": "user", "content": [image, ask]},
                {"role": "assistant", "content": "red", "task": "colour"},
            ],
        },
        {
            "id": "b",
            "messages": [
                {"role": "user", "content": [audio, ask]},
                {"role": "assistant", "content": "two", "task": "speech"},
            ],
        },
        {
            "id": "c",
            "messages": [
                {"role": "user", "content": [image, {"type": "text", "text": "where is it"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "box", "box": [4, 4, 15, 15]}],
                    "task": "grounding",
                },
            ],
        },
    ]
    (root / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines.append(
        {"id": "d", "messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]}
    )
    (root / "one_bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root
