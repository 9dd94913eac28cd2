"""What a person writes: conversations of messages whose parts are text, pictures, sound and boxes.

The JSON is the chat format of OpenAI and transformers, so that a data set, a prompt in Python and a request
to a server are one thing:

    {"id": "7", "messages": [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "who?"}]},
        {"role": "assistant", "content": [{"type": "box", "box": [4, 8, 20, 40]}], "task": "grounding"}]}
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mm_jax.errors import UserError, nearest

ROLES = ("system", "user", "assistant")
_PLACEHOLDERS = {"image": "<image>", "audio": "<audio>"}


class BadSample(UserError):
    """One sample that cannot be used; `reason` is a short key under which a pipeline counts the drop."""

    def __init__(self, message: str, reason: str = "bad_sample"):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Region:
    """What is where, for the dense targets of encoder training; the decoder never sees it.

    label: space separated label words, for example "red circle". The name in a word stands behind its last
    underscore ("digit_7" is called "7"); a word that begins with one ("_place_0", the first of a row) tells how the
    picture is built and is no name. box: (x0, y0, x1, y1) in pixels of the
    original picture, or (start, end) in seconds of the original clip.
    """

    label: str
    box: tuple[float, ...]


@dataclass(frozen=True)
class Image:
    """source: encoded bytes, a path, a data URL, a PIL image or an array [H, W(, 1|3|4)]."""

    source: bytes | str | PIL.Image.Image | np.ndarray
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Audio:
    """source: encoded bytes, path, data URL, or samples [T] or [T, channels] with `sample_rate` (Hz)."""

    source: bytes | str | np.ndarray
    sample_rate: int | None = None
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class Video:
    """source: a film (MP4, WebM, ...) or animation (GIF, WebP, APNG) as encoded bytes, a path or a data URL; or frames,
    uint8 [T, H, W, 3] or a list of what `Image` takes. rate: frames a second, where the source does not say."""

    source: bytes | str | np.ndarray | list
    rate: float | None = None


@dataclass(frozen=True)
class Box:
    """(x0, y0, x1, y1) in original pixels (after EXIF rotation) of the conversation's `image`-th picture."""

    box: tuple[float, float, float, float]
    image: int = 0


Part = Text | Image | Audio | Video | Box


@dataclass(frozen=True)
class Message:
    """task: the question type that an assistant message answers ("count", "ocr", ...), for the scores."""

    role: str
    parts: tuple[Part, ...]
    task: str = ""


@dataclass(frozen=True)
class Conversation:
    """rejected: for preference data, the worse parts in place of those of the last assistant message."""

    messages: tuple[Message, ...]
    id: str = ""
    source: str = ""
    rejected: tuple[Part, ...] | None = None

    def parts(self) -> Iterator[Part]:
        return (part for message in self.messages for part in message.parts)

    def images(self) -> list[Image]:
        return [part for part in self.parts() if isinstance(part, Image)]

    def audio(self) -> list[Audio]:
        return [part for part in self.parts() if isinstance(part, Audio)]


def conversation_from_json(
    obj: dict, *, root: Path | None = None, images: Sequence = (), audio: Sequence = ()
) -> Conversation:
    """One JSON object of the chat format to a Conversation; media are not opened.

    root: folder that relative paths start from. images, audio: encoded media that integer references index.
    Where the object itself lists media ("images": [paths], "audio": [paths]), `<image>` and `<audio>` inside
    text stand for the next of the list, as does a part {"type": "image"} without a picture.

    Raises BadSample that names the sample: empty conversation, unknown role, key or part, counts that differ.
    """
    if not isinstance(obj, dict):
        raise BadSample(f"a conversation is a JSON object, not {type(obj).__name__}", "bad_conversation")
    return _Reader(obj, root, images, audio).conversation()


def messages_from_json(
    messages: Sequence[dict | Message], *, root: Path | None = None
) -> tuple[Message, ...]:
    """A chat prompt (a list of message objects, JSON or already Message) to messages."""
    if all(isinstance(message, Message) for message in messages):
        return tuple(messages)
    return conversation_from_json({"messages": list(messages)}, root=root).messages


def parts_from_json(content: Any, where: str) -> tuple[Part, ...]:
    """The content of one message (a text, or a list of parts) to parts; `where` is for messages of errors."""
    return _Reader({}, None, (), ()).content(content, where)


class _Reader:
    """State of reading one conversation: which listed media the placeholders have taken."""

    def __init__(self, obj: dict, root: Path | None, images: Sequence, audio: Sequence):
        self.obj, self.root = obj, root
        self.where = f'sample "{obj["id"]}"' if obj.get("id") not in (None, "") else "sample"
        self.media = {"image": images, "audio": audio}
        self.listed = {}
        for kind, key in (("image", "images"), ("audio", "audio")):
            if obj.get(key) is not None:
                if not isinstance(obj[key], list):
                    raise self.bad(f'"{key}" must be a list of paths')
                self.listed[kind] = self.media[kind] = obj[key]
        self.taken = {"image": 0, "audio": 0}
        self.named: dict[str, set[int]] = {"image": set(), "audio": set()}

    def bad(self, text: str, reason: str = "bad_conversation") -> BadSample:
        return BadSample(f"{self.where}: {text}", reason)

    def conversation(self) -> Conversation:
        self.check_keys(self.obj, ("id", "messages", "rejected", "source", "images", "audio"), "conversation")
        messages = self.obj.get("messages")
        if not isinstance(messages, list):
            raise self.bad('needs "messages": a list')
        if not messages:
            raise self.bad("the conversation is empty", "empty_conversation")
        read = tuple(self.message(message, k) for k, message in enumerate(messages))
        rejected = self.obj.get("rejected")
        if rejected is not None:
            rejected = self.content(rejected, '"rejected"')
            if any(isinstance(part, Image | Audio) for part in rejected):
                raise self.bad('"rejected" may hold text and boxes only')
        for kind, media in self.media.items():
            self.check_count(kind, len(media))
        return Conversation(read, str(self.obj.get("id") or ""), str(self.obj.get("source") or ""), rejected)

    def check_keys(self, obj: dict, known: tuple[str, ...], what: str) -> None:
        for key in obj:
            if key not in known:
                raise self.bad(f'unknown key "{key}" in a {what}{nearest(key, known)}')

    def check_count(self, kind: str, count: int) -> None:
        """Every listed picture or clip must be placed by a placeholder or by its number."""
        placeholders = self.taken[kind]
        if placeholders > count or len(self.named[kind] | set(range(placeholders))) != count:
            noun = f"{kind}s" if kind == "image" and count != 1 else kind
            plural = "" if placeholders == 1 else "s"
            text = f"{placeholders} {_PLACEHOLDERS[kind]} placeholder{plural} but {count} {noun}"
            if self.named[kind]:
                text = f"{len(self.named[kind])} of {count} {noun} are in a message"
            raise self.bad(text, "placeholder_mismatch")

    def message(self, obj: Any, k: int) -> Message:
        where = f"message {k}"
        if not isinstance(obj, dict):
            raise self.bad(f"{where} must be an object with role and content")
        self.check_keys(obj, ("role", "content", "task"), "message")
        role = obj.get("role")
        if role not in ROLES:
            raise self.bad(f'{where} has unknown role "{role}"{nearest(str(role), ROLES)}')
        return Message(role, self.content(obj.get("content"), where), str(obj.get("task") or ""))

    def content(self, content: Any, where: str) -> tuple[Part, ...]:
        if isinstance(content, str):
            return self.text(content)
        if not isinstance(content, list):
            raise self.bad(f"{where}: content must be a string or a list of parts")
        parts: list[Part] = []
        for part in content:
            if isinstance(part, str):
                parts.extend(self.text(part))
            elif isinstance(part, dict):
                parts.extend(self.part(part, where))
            else:
                raise self.bad(f"{where}: a part must be an object, not {type(part).__name__}")
        return tuple(parts)

    def text(self, text: str) -> tuple[Part, ...]:
        """Text with the placeholders of listed media taken out; without a list `<image>` is ordinary text."""
        parts: list[Part] = [Text(text)] if text else []
        for kind in self.listed:
            split: list[Part] = []
            for part in parts:
                if not isinstance(part, Text):
                    split.append(part)
                    continue
                for k, piece in enumerate(part.text.split(_PLACEHOLDERS[kind])):
                    if k:
                        split.append(Image("") if kind == "image" else Audio(""))
                    # LLaVA writes "<image>\nquestion": the line break belongs to the placeholder
                    piece = piece.removeprefix("\n") if k else piece
                    if piece:
                        split.append(Text(piece))
            parts = split
        return tuple(self.next_listed(part) for part in parts)

    def next_listed(self, part: Part) -> Part:
        if isinstance(part, Text):
            return part
        kind = "image" if isinstance(part, Image) else "audio"
        k = self.taken[kind]
        self.taken[kind] += 1
        # one too many is reported with both counts once all placeholders are known
        source = self.listed[kind][k] if k < len(self.listed[kind]) else ""
        return type(part)(self.path(source) if source != "" else "")

    def part(self, obj: dict, where: str) -> tuple[Part, ...]:
        kind = obj.get("type")
        if kind == "text":
            self.check_keys(obj, ("type", "text"), "text part")
            if not isinstance(obj.get("text"), str):
                raise self.bad(f'{where}: a text part needs "text": a string')
            return self.text(obj["text"])
        if kind == "box":
            self.check_keys(obj, ("type", "box", "image"), "box part")
            image = obj.get("image", 0)
            if not isinstance(image, int) or image < 0:
                raise self.bad(f'{where}: "image" of a box is the number of a picture, not {image!r}')
            return (Box(self.numbers(obj.get("box"), (4,), where), image),)
        if kind in ("image", "image_url"):
            self.check_keys(obj, ("type", "image", "image_url", "url", "path", "regions"), "image part")
            source = _first(obj, "image", "path", "url")
            if kind == "image_url":
                source = obj.get("image_url")
                source = source.get("url") if isinstance(source, dict) else source
            regions = self.regions(obj.get("regions", ()), 4, where)
            return (Image(self.media_source("image", source, where), regions),)
        if kind in ("audio", "input_audio"):
            self.check_keys(
                obj, ("type", "audio", "input_audio", "url", "path", "sample_rate", "regions"), "audio part"
            )
            source = _first(obj, "audio", "path", "url")
            regions = self.regions(obj.get("regions", ()), 2, where)
            if kind == "input_audio":
                data = obj.get("input_audio")
                return (Audio(self.base64(data, where), None, regions),)
            return (Audio(self.media_source("audio", source, where), obj.get("sample_rate"), regions),)
        if kind == "video":
            self.check_keys(obj, ("type", "video", "url", "path", "fps"), "video part")
            source, rate = _first(obj, "video", "path", "url"), obj.get("fps")
            if source is None or (isinstance(source, str | list) and not source):
                raise self.bad(f'{where}: the part of type "video" has no video', "placeholder_mismatch")
            if rate is not None and (
                not isinstance(rate, int | float) or isinstance(rate, bool) or rate <= 0
            ):
                raise self.bad(f'{where}: "fps" is {rate!r}; frames a second are needed')
            frames = [self.path(frame) for frame in source] if isinstance(source, list) else self.path(source)
            return (Video(frames, rate),)
        known = ("text", "image", "image_url", "audio", "input_audio", "video", "box")
        raise self.bad(f'{where}: unknown part type "{kind}"{nearest(str(kind), known)}')

    def base64(self, data: Any, where: str) -> bytes:
        data = data.get("data") if isinstance(data, dict) else data
        try:
            return base64.b64decode(data, validate=True)
        except (TypeError, ValueError):
            text = f'{where}: "input_audio" needs {{"data": base64 text}}'
            raise self.bad(text, "unreadable_audio") from None

    def media_source(self, kind: str, source: Any, where: str) -> Any:
        if isinstance(source, bool):
            raise self.bad(f"{where}: {kind} must be a path, a data URL or a number")
        if isinstance(source, int):
            count = len(self.media[kind])
            if not 0 <= source < count:
                text = f"{where}: {kind} {source} asked for, but there are {count}"
                raise self.bad(text, "placeholder_mismatch")
            self.named[kind].add(source)
            return self.path(self.media[kind][source])
        if source is None and kind in self.listed:
            part = self.next_listed(Image("") if kind == "image" else Audio(""))
            return part.source
        if source is None or source == "":
            raise self.bad(f'{where}: the part of type "{kind}" has no {kind}', "placeholder_mismatch")
        return self.path(source)

    def path(self, source: Any) -> Any:
        if isinstance(source, Path):
            source = str(source)
        is_path = isinstance(source, str) and not source.startswith(("data:", "http://", "https://"))
        return str(self.root / source) if is_path and self.root is not None else source

    def numbers(self, values: Any, counts: tuple[int, ...], where: str) -> tuple[float, ...]:
        numeric = isinstance(values, Sequence) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
        )
        if not numeric or len(values) not in counts:
            raise self.bad(f"{where}: a box here is {counts[0]} finite numbers, not {values!r}", "bad_box")
        return tuple(float(v) for v in values)

    def regions(self, regions: Any, count: int, where: str) -> tuple[Region, ...]:
        if not isinstance(regions, Sequence) or isinstance(regions, str):
            raise self.bad(f'{where}: "regions" must be a list of {{"label", "box"}}')
        out = []
        for region in regions:
            if not isinstance(region, dict) or not isinstance(region.get("label"), str):
                raise self.bad(f'{where}: a region needs "label" and "box"')
            self.check_keys(region, ("label", "box"), "region")
            out.append(Region(region["label"], self.numbers(region.get("box"), (count,), where)))
        return tuple(out)


def _first(obj: dict, *keys: str) -> Any:
    """transformers writes the source of a part under any of these names."""
    return next((obj[key] for key in keys if obj.get(key) is not None), None)


def conversation_to_json(conversation: Conversation) -> dict:
    """The JSON of a conversation. Media that are paths or data URLs stay so; others become base64."""
    obj: dict[str, Any] = {"id": conversation.id} if conversation.id else {}
    if conversation.source:
        obj["source"] = conversation.source
    obj["messages"] = []
    for message in conversation.messages:
        item = {"role": message.role, "content": _content_to_json(message.parts)}
        obj["messages"].append(item | ({"task": message.task} if message.task else {}))
    if conversation.rejected is not None:
        obj["rejected"] = _content_to_json(conversation.rejected)
    return obj


def _content_to_json(parts: tuple[Part, ...]) -> str | list[dict]:
    if len(parts) == 1 and isinstance(parts[0], Text):
        return parts[0].text
    return [_part_to_json(part) for part in parts]


def _part_to_json(part: Part) -> dict:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, Box):
        return {"type": "box", "box": list(part.box), "image": part.image}
    if isinstance(part, Video):
        several = isinstance(part.source, list | np.ndarray)
        source = [_image_url(frame) for frame in part.source] if several else _image_url(part.source)
        return {"type": "video", "video": source} | ({} if part.rate is None else {"fps": part.rate})
    if isinstance(part, Image):
        item = {"type": "image", "image": _image_url(part.source)}
    elif isinstance(part.source, str):
        rate = {} if part.sample_rate is None else {"sample_rate": part.sample_rate}
        item = {"type": "audio", "audio": part.source} | rate
    else:
        data = base64.b64encode(_audio_bytes(part)).decode()
        item = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    if part.regions:
        item["regions"] = [{"label": region.label, "box": list(region.box)} for region in part.regions]
    return item


def _image_url(source: bytes | str | PIL.Image.Image | np.ndarray) -> str:
    if isinstance(source, str):
        return source
    if not isinstance(source, bytes):
        image = PIL.Image.fromarray(source) if isinstance(source, np.ndarray) else source
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        source = buffer.getvalue()
    kind = "jpeg" if source[:2] == b"\xff\xd8" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(source).decode()}"


def _audio_bytes(part: Audio) -> bytes:
    if isinstance(part.source, bytes):
        return part.source
    import soundfile  # only here: reading and writing text conversations needs no sound library

    if part.sample_rate is None:
        raise UserError("audio samples need a sample_rate (Hz) to be written")
    buffer = io.BytesIO()
    soundfile.write(buffer, part.source, part.sample_rate, "FLOAT", format="WAV")
    return buffer.getvalue()
