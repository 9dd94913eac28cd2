"""Where conversations come from: chat JSONL, LLaVA JSON and TFDS, each as a lazy random-access sequence.

A source is opened once, knows its length, and hands out `source[i]` as a `Conversation` whose `source` field
is the name it has in the config. Nothing but an index is held in memory: the text of a sample is read when
it is asked for, media stay paths or encoded bytes until the processor decodes them. Sources can be pickled
(worker processes open the files again) and read from several threads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from json.decoder import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from mm_jax.data.messages import BadSample, Conversation, conversation_from_json
from mm_jax.data.tfds_source import TfdsSource
from mm_jax.errors import UserError, nearest

KINDS = ("tfds", "chat", "llava")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One entry of `sources` in a run config."""

    kind: Literal["tfds", "chat", "llava"]
    """chat: JSON lines of OpenAI/transformers messages. llava: a JSON list of `image` + `conversations`.
    tfds: below."""
    path: str
    """The file; for tfds the directory of a prepared builder (the one with dataset_info.json), or a
    registered name such as mm_jax_quickstart/digits, looked up in `data_dir`."""
    split: str = "train"
    """tfds: the split, slices allowed ("train[:90%]"). Files have no splits."""
    mapping: str = ""
    """tfds: "module:function" that turns a record into a Conversation or its JSON. Empty: the record has the
    features `conversation` (JSON text) and, where used, `id`, `images`, `audio`."""


class Source(Protocol):
    """What the pipeline needs. `source[i]` raises `UserError` for a bad sample; it can be pickled."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


def open_source(name: str, config: SourceConfig, data_dir: str | os.PathLike = "data") -> Source:
    """Open one source. `data_dir` is where TFDS keeps its data sets; files are found by `config.path` alone.

    Raises `UserError`: unknown kind, missing file or data set, missing split, data set not in ArrayRecord
    format, a mapping that cannot be imported, nothing in it.
    """
    if config.kind not in KINDS:
        raise UserError(f'source "{name}": unknown kind "{config.kind}"{nearest(config.kind, KINDS)}')
    if config.mapping and config.kind != "tfds":
        raise UserError(f'source "{name}": a mapping is for tfds sources, not for kind "{config.kind}"')
    if config.kind == "tfds":
        source: Source = TfdsSource(name, config.path, config.split, config.mapping, data_dir)
    else:
        source = {"chat": ChatSource, "llava": LlavaSource}[config.kind](name, config.path)
    if not len(source):
        raise UserError(f'source "{name}": {config.path} holds no samples')
    return source


class _IndexedFile:
    """A file of JSON objects, held as byte spans; one object is read by position when it is asked for."""

    def __init__(self, name: str, path: str | os.PathLike):
        self.name = name
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f'source "{name}": no file {self.path}')
        self._root = self.path.parent
        self._file: int | None = None
        self._spans = self._index()  # int64 [samples, 2]: first byte, one past the last byte

    def _index(self) -> np.ndarray:
        raise NotImplementedError

    def _conversation(self, obj: Any) -> Conversation:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Conversation:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}[{index}] of {len(self)} samples")
        start, end = self._spans[index]
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        # pread: threads share the descriptor without sharing a position
        text = os.pread(self._file, int(end - start), int(start))
        try:
            obj = json.loads(text)
        except ValueError as error:
            raise BadSample(f"{self._where(index)}: not valid JSON ({error})", "bad_json") from None
        if not isinstance(obj, dict):
            found = type(obj).__name__
            raise BadSample(f"{self._where(index)}: expected a JSON object, found {found}", "bad_json")
        try:
            conversation = self._conversation(obj)
        except UserError as error:
            # the file and line are known only here; the class and its `reason` stay as they are
            error.args = (f"{self._where(index)}: {error}",)
            raise
        return dataclasses.replace(
            conversation, source=self.name, id=conversation.id or f"{self.path.name}:{self._line(index)}"
        )

    def _where(self, index: int) -> str:
        return f"{self.path}:{self._line(index)}"

    def _line(self, index: int) -> int:
        """Line number in the file, from 1. Counted when asked for, so that the index stays two numbers a
        sample."""
        return _line_at(self.path, int(self._spans[index][0]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self):
        if getattr(self, "_file", None) is not None:
            os.close(self._file)


def _line_at(path: Path, position: int) -> int:
    with open(path, "rb") as file:
        line = 1
        while position > 0:
            chunk = file.read(min(position, 1 << 20))
            line += chunk.count(b"\n")
            position -= len(chunk) or position
    return line


class ChatSource(_IndexedFile):
    """One conversation a line, in the chat format of `conversation_from_json`. Blank lines are skipped.

    Relative media paths start at the folder of the file. A line that is not JSON fails when it is read, with
    `file:line`, and not when the file is opened: a training run drops and counts it.

    >>> ChatSource("mine", "chat.jsonl")[0]  # doctest: +SKIP
    Conversation(messages=(Message(role='user', ...), ...), id='chat.jsonl:1', source='mine', ...)
    """

    def _index(self) -> np.ndarray:
        spans, position = [], 0
        with open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    spans.append((position, position + len(line)))
                position += len(line)
        return np.array(spans, np.int64).reshape(-1, 2)

    def _conversation(self, obj: dict[str, Any]) -> Conversation:
        return conversation_from_json(obj, root=self._root)


class LlavaSource(_IndexedFile):
    """The JSON list that LLaVA trains on: `image` (a path or a list of paths) and `conversations`.

    Format of https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md:

        [{"id": "1", "image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

    The list is parsed once to find where each item starts and ends; items are read again when asked for, so
    a file of a gigabyte costs sixteen bytes a sample in memory. Relative paths start at the folder of the
    file.
    """

    def _index(self) -> np.ndarray:
        try:
            text = self.path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 text (byte {error.start})") from None
        try:
            pieces = _list_items(text)
        except JSONDecodeError as error:
            raise UserError(f"{self.path}:{error.lineno}: not valid JSON ({error.msg})") from None
        # byte offsets grow piece by piece, because a character may take several bytes
        spans, byte, counted = [], 0, 0
        for start, end in pieces:
            byte += len(text[counted:start].encode())
            length = len(text[start:end].encode())
            spans.append((byte, byte + length))
            byte, counted = byte + length, end
        return np.array(spans, np.int64).reshape(-1, 2)

    def _conversation(self, obj: dict[str, Any]) -> Conversation:
        return conversation_from_json(llava_to_chat(obj), root=self._root)


_BLANK = re.compile(r"\s*")


def _list_items(text: str) -> list[tuple[int, int]]:
    """Where each item of a JSON list starts and ends, in characters.

    >>> _list_items('[{"a": 1}, 2]')
    [(1, 9), (11, 12)]

    Raises JSONDecodeError at the first place that is not JSON.
    """

    def skip(at: int) -> int:
        return _BLANK.match(text, at).end()

    at = skip(1 if text.startswith("\ufeff") else 0)
    if text[at : at + 1] != "[":
        raise JSONDecodeError("a list of samples must start with '['", text, at)
    items: list[tuple[int, int]] = []
    decoder = JSONDecoder()
    at = skip(at + 1)
    while text[at : at + 1] != "]":
        end = decoder.raw_decode(text, at)[1]
        items.append((at, end))
        at = skip(end)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
            if text[at : at + 1] == "]":
                raise JSONDecodeError("an item must follow ','", text, at)
        elif text[at : at + 1] != "]":
            raise JSONDecodeError("expected ',' or ']'", text, at)
    return items


_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def llava_to_chat(obj: Mapping[str, Any]) -> dict[str, Any]:
    """One LLaVA sample as chat JSON with a top-level `images` list.

    >>> llava_to_chat({"image": "a.png", "conversations": [{"from": "human", "value": "<image> Hi"}]})
    {'id': '', 'messages': [{'role': 'user', 'content': '<image> Hi'}], 'images': ['a.png']}
    """
    turns = obj.get("conversations")
    if not isinstance(turns, list):
        raise BadSample('LLaVA sample without the list "conversations"', "bad_conversation")
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise BadSample('LLaVA turn without a text "value"', "bad_conversation")
        role = turn.get("from")
        if role not in _LLAVA_ROLES:
            hint = nearest(str(role), _LLAVA_ROLES)
            raise BadSample(f'unknown LLaVA speaker "{role}"{hint}', "bad_conversation")
        messages.append({"role": _LLAVA_ROLES[role], "content": turn["value"]})
    image = obj.get("image") or []
    images = [image] if isinstance(image, str) else list(image)
    return {"id": str(obj.get("id", "")), "messages": messages, "images": images}
