"""What a renderer returns, and how it becomes a record of the data set."""

import io
import json
import random
import wave
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SAMPLE_RATE = 16_000
SPLITS = ("train", "validation", "test")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mark:
    """A labelled region: (x0, y0, x1, y1) in pixels of a picture, or (start, end) in seconds of a clip."""

    label: str
    box: tuple[float, ...]


@dataclass(frozen=True)
class Picture:
    image: Image.Image
    regions: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Clip:
    """Mono float waveform in -1..1 at 16 kHz."""

    waveform: np.ndarray
    regions: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One question with its answer: a short lower-case text, a box in pixels of picture `image`, or several of both."""

    task: str
    question: str
    answer: str | Box | list[str | Box]
    image: int = 0


@dataclass(frozen=True)
class Sample:
    """Pictures and clips, all shown in the first question, and the turns about them."""

    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...] = ()
    clips: tuple[Clip, ...] = ()
    note: str = ""


def record(sample: Sample, key: str) -> dict:
    """The features of one record: id, conversation (chat JSON), images (PNG bytes), audio (WAV bytes).

    The conversation refers to media by their index: `{"type": "image", "image": 0, "regions": [...]}`.
    """
    media = [
        {"type": kind, kind: index, "regions": [_mark(mark) for mark in item.regions]}
        for kind, items in (("image", sample.pictures), ("audio", sample.clips))
        for index, item in enumerate(items)
    ]
    messages = []
    for turn in sample.turns:
        question = {"type": "text", "text": turn.question}
        messages.append({"role": "user", "content": media + [question] if media else turn.question})
        messages.append({"role": "assistant", "content": _answer(turn), "task": turn.task})
        media = []
    if sample.note:
        key = f"{key}-{sample.note}"
    return {
        "id": key,
        "conversation": json.dumps({"id": key, "messages": messages}, separators=(",", ":")),
        "images": [png_bytes(picture.image) for picture in sample.pictures],
        "audio": [wav_bytes(clip.waveform) for clip in sample.clips],
    }


def _mark(mark: Mark) -> dict:
    digits = 3 if len(mark.box) == 2 else 1
    return {"label": mark.label, "box": [round(float(value), digits) for value in mark.box]}


def _answer(turn: Turn) -> str | list[dict]:
    if isinstance(turn.answer, str):
        return turn.answer
    parts = turn.answer if isinstance(turn.answer, list) else [turn.answer]
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "box", "box": [round(float(v), 1) for v in part], "image": turn.image}
        for part in parts
    ]


def png_bytes(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)  # level 1: three times as fast, files 10 % larger
    return stream.getvalue()


def wav_bytes(waveform: np.ndarray) -> bytes:
    """16-bit PCM mono WAV file at 16 kHz of a float waveform [T] in -1..1."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
    return stream.getvalue()


def split_of(fact: str) -> str:
    """The one split in which a fact (a word, a sum, the values of a chart) may appear: 70 / 10 / 20 %."""
    part = zlib.crc32(fact.encode()) % 10
    return "test" if part < 2 else "validation" if part == 2 else "train"


def sides(rng: random.Random, low: int, high: int, aspect: float = 1.5) -> tuple[int, int]:
    """(width, height) of a picture: square in 60 % of the cases, else up to `aspect` wide or tall."""
    long = rng.randint(low, high)
    if rng.random() < 0.6:
        return long, long
    short = max(low * 3 // 4, round(long / rng.uniform(1.0, aspect)))
    return (long, short) if rng.random() < 0.5 else (short, long)


def pick(rng: random.Random, templates: Sequence[str], **values: object) -> str:
    """One of several wordings, filled in."""
    return rng.choice(templates).format(**values)


def numpy_rng(rng: random.Random) -> np.random.Generator:
    return np.random.default_rng(rng.getrandbits(64))
