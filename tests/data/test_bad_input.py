"""Every kind of bad sample beside good ones, from files to batches: counted under its reason, nothing else lost."""

import io
import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile

from mm_jax.data.audio import AudioRule
from mm_jax.data.image import ImageRule
from mm_jax.data.messages import Conversation, Message, Text
from mm_jax.data.packing import BatchConfig, Layout
from mm_jax.data.pipeline import TrainData
from mm_jax.data.processor import Processor, ProcessorConfig, fit_processor
from mm_jax.data.sources import SourceConfig, open_source
from mm_jax.errors import UserError

IMAGE = {"type": "image", "image": "good.png"}
AUDIO = {"type": "audio", "audio": "good.wav"}


def ask(*parts: dict, answer: str = "yes", **fields) -> dict:
    question = [*parts, {"type": "text", "text": "what is it?"}]
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        **fields,
    }


def picture(name: str) -> dict:
    return ask({"type": "image", "image": name})


# kind of mistake -> (sample, reason it is counted under, what the sentence says)
MISTAKES = {
    "truncated": (picture("truncated.jpg"), "unreadable_image", "truncated"),
    "nothing": (picture("empty.png"), "unreadable_image", "empty.png: the file is empty"),
    "text": (picture("text.png"), "unreadable_image", "not an image"),
    "bomb": (picture("bomb.png"), "image_bomb", "bomb.png: 400000000 pixels, at most"),
    "gone": (picture("gone.png"), "missing_file", "no such file"),
    "slow": (ask({"type": "audio", "audio": "slow.wav"}), "bad_sample_rate", "100 Hz"),
    "silent": ({"messages": []}, "empty_conversation", "the conversation is empty"),
    "blind": (
        {
            **ask(),
            "messages": [{"role": "user", "content": "<image> what?"}, ask()["messages"][1]],
            "images": [],
        },
        "placeholder_mismatch",
        "1 <image> placeholder but 0 images",
    ),
    "unseen": (
        {
            "messages": [{"role": "user", "content": "what?"}, ask()["messages"][1]],
            "images": ["good.png"],
        },
        "placeholder_mismatch",
        "0 <image> placeholders but 1 image",
    ),
    "long": (ask(answer="yes no " * 60), "too_long", "a row holds 48"),
    "album": (ask(*[IMAGE] * 3), "too_many_images", "3 image slots, a row holds 2"),
    "unanswered": ({"messages": ask()["messages"][:1]}, "no_trainable_token", "no assistant message"),
}
GOOD = 3


def png_header(side: int) -> bytes:
    """A PNG that claims to be side x side and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    random = np.random.default_rng(0)
    image = PIL.Image.fromarray(random.integers(0, 256, (40, 60, 3), np.uint8))
    image.save(root / "good.png")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    (root / "truncated.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (root / "empty.png").touch()
    (root / "text.png").write_text("not a picture")
    (root / "bomb.png").write_bytes(png_header(20_000))
    soundfile.write(root / "good.wav", 0.1 * random.normal(size=2000), 16_000, "PCM_16")
    soundfile.write(root / "slow.wav", 0.1 * random.normal(size=2000), 100, "PCM_16")
    for name, (sample, _, _) in MISTAKES.items():
        good = [ask(IMAGE, AUDIO, answer=f"{name} {k}", id=f"{name}-{k}") for k in range(GOOD)]
        lines = [good[0], {"id": f"{name}-bad", **sample}, *good[1:]]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return root


@pytest.fixture(scope="module")
def processor() -> Processor:
    config = ProcessorConfig(
        image=ImageRule(height=16, width=16, num_tokens=2),
        audio=AudioRule(max_frames=16, num_tokens=2, frames_per_token=8),
        box_bins=4,
    )
    words = Message("user", (Text("what is it? yes no " + " ".join(MISTAKES)),))
    return fit_processor(config, [Conversation((words, words))] * 3, 320)


def train_data(directory: Path, processor: Processor, names, **options) -> TrainData:
    return TrainData(
        {name: open_source(name, SourceConfig("chat", str(directory / f"{name}.jsonl"))) for name in names},
        dict.fromkeys(names, 1.0),
        BatchConfig(rows=2, length=48, images=2, audio=2, bins=4),
        processor.example,
        Layout.of(processor),
        **options,
    )


def test_each_is_counted_and_nothing_else_is_lost(directory, processor):
    names = sorted(MISTAKES)
    answers: Counter = Counter()
    with train_data(directory, processor, names) as data:
        epochs: dict = {}
        while min(epochs.get(name, 0) for name in names) < 2:
            batch, info = next(data)
            epochs = info.epochs
            for row in range(2):
                for segment in range(1, batch["segment_ids"][row].max() + 1):
                    mine = (batch["segment_ids"][row] == segment) & (batch["loss_weights"][row] > 0)
                    answers[processor.text(batch["tokens"][row][mine])] += 1
        state, drops, messages = data.state(), data.drops, data.drop_messages
    for name, (_, reason, text) in MISTAKES.items():
        assert set(drops[name]) == {reason}, name
        assert drops[name][reason] >= 2  # once in each of the epochs that are over
        message = messages[name, reason]
        assert f'of source "{name}": ' in message and f'sample "{name}-bad"' in message and text in message
        assert "\n" not in message
    (stream,) = state["streams"]
    waiting = sum(map(len, stream["rows"]))
    assert answers.total() + waiting + sum(c.total() for c in drops.values()) == stream["next_index"]
    assert set(answers) == {f"{name} {k}" for name in names for k in range(GOOD)}
    # every good sample of the finished epochs was trained on, but for those that wait in open rows
    assert sum(max(0, 2 - answers[answer]) for answer in answers) <= waiting


@pytest.mark.parametrize("name", ["truncated", "blind", "long"])
def test_strict_stops_with_one_line(directory, processor, name):
    _, reason, text = MISTAKES[name]
    with train_data(directory, processor, [name], strict=True) as data:
        with pytest.raises(UserError, match="^[^\n]*$") as error:
            for _ in range(20):
                next(data)
    for words in (f'of source "{name}"', f'sample "{name}-bad"', text, reason):
        assert words in str(error.value)
