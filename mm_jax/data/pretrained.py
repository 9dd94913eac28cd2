"""Conversations to examples, and answers back, with the tokenizer and template of a Hugging Face directory."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mm_jax.data.chat_template import ChatTemplate, read_template, unmark
from mm_jax.data.example import TAPS, Example
from mm_jax.data.image import Transform
from mm_jax.data.media import MAX_PIXELS, decode_audio, decode_image, decode_video
from mm_jax.data.media_rule import MEDIA, NOWHERE, Arrays, Item, MediaRule
from mm_jax.data.messages import (
    Audio,
    BadSample,
    Box,
    Conversation,
    Image,
    Message,
    Part,
    Text,
    Video,
    parts_from_json,
)
from mm_jax.data.packing import Layout
from mm_jax.data.pretrained_tokenizer import PretrainedTokenizer
from mm_jax.errors import UserError

Items = dict[str, list[Item]]
KINDS = {"image": Image, "audio": Audio, "video": Video}
_NAMES = {"image": "picture", "audio": "clip", "video": "video"}


class PretrainedProcessor:
    """What `mm_jax.data.processor.Processor` is for our own models. Picklable and without state.

    Args:
      template: None where the directory has none; then only text and arrays can be used.
      rule: of the family.
      pad_id, stop_ids: of the checkpoint.
      layout: shapes of the media slots, for who makes batches without knowing the model.
    """

    def __init__(
        self,
        tokenizer: PretrainedTokenizer,
        template: ChatTemplate | None,
        rule: MediaRule,
        *,
        pad_id: int,
        stop_ids: Sequence[int],
        layout: Layout | None = None,
    ):
        self._fill = pad_id
        if rule.pieces:
            token = next(iter(rule.tokens.values()))
            if tokenizer.backend.id_to_token(token) is not None:  # nothing reads it, but people
                self._fill = token
            rule = copy.copy(rule)
            rule.tokens = dict.fromkeys(rule.tokens, NOWHERE)
        self.tokenizer, self.template, self.rule = tokenizer, template, rule
        self.pad_id, self.stop_ids, self.layout = pad_id, tuple(stop_ids), layout
        self._tokens = {
            kind: MEDIA if rule.pieces else self._token(token) for kind, token in rule.tokens.items()
        }

    def _token(self, token: int) -> str:
        found = self.tokenizer.backend.id_to_token(token)
        if found is None:
            raise UserError(f"the tokenizer has no token {token}, which config.json names for media")
        return found

    @classmethod
    def load(
        cls,
        directory: str | Path,
        rule: MediaRule,
        *,
        pad_id: int,
        stop_ids: Sequence[int],
        template: str | None = None,
        template_first: bool = False,
        layout: Layout | None = None,
    ) -> PretrainedProcessor:
        """From the files of a directory.

        Args:
          template: of the family, where the directory has none.
          template_first: it comes before that of the directory.

        Raises UserError: no tokenizer.json, or damaged files.
        """
        tokenizer = PretrainedTokenizer.load(directory)
        source = (template if template_first else None) or read_template(directory) or template
        found = None if source is None else ChatTemplate(source, tokenizer.named)
        return cls(tokenizer, found, rule, pad_id=pad_id, stop_ids=stop_ids, layout=layout)

    def with_template(self, source: str) -> PretrainedProcessor:
        """The same with another chat template. Raises UserError for one that cannot be read."""
        found = copy.copy(self)
        found.template = ChatTemplate(source, self.tokenizer.named)
        return found

    def prompt(
        self,
        messages: Conversation | Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Example:
        """Everything up to and including the header of the answer to come; nothing is trainable.

        Args:
          messages: `Message`s, or JSON objects with whatever keys the template knows (tool_calls, name, ...).
          tools, options: see `ChatTemplate.render`.

        Raises BadSample: what the template refuses, unreadable media, or media whose placeholders are not in the text.
        """
        messages = messages.messages if isinstance(messages, Conversation) else messages
        plain, items, transforms = self._read(messages)
        text = self._template.render(plain, answer_header=True, tools=tools, options=options)
        return self._example(unmark(text)[0], items, transforms)

    def example(
        self,
        conversation: Conversation | Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Example:
        """A conversation that ends with an answer; trainable are all answers and the stop tokens behind them."""
        known = isinstance(conversation, Conversation)
        messages = conversation.messages if known else conversation
        plain, items, transforms = self._read(messages)
        stops = [
            self.tokenizer.decode([token], special=True) or self._token(token) for token in self.stop_ids
        ]
        text = self._template.marked(plain, stops, tools=tools, options=options)
        source, name = (conversation.source, conversation.id) if known else ("", "")
        return self._example(text, items, transforms, source=source, id=name)

    @property
    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise UserError(
                "the checkpoint has no chat template (chat_template.jinja), so messages cannot be written as text; use "
                "lm.batch(input_ids=..., ...)"
            )
        return self.template

    def _read(
        self, messages: Sequence[Message | Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], Items, list[Transform]]:
        """Plain data for the template, the media, and where their pixels are."""
        read = [
            m.parts if isinstance(m, Message) else parts_from_json(m.get("content") or "", f"message {k}")
            for k, m in enumerate(messages)
        ]
        sources: dict[str, list[Part]] = {
            kind: [part for parts in read for part in parts if isinstance(part, of)]
            for kind, of in KINDS.items()
        }
        for kind, found in sources.items():
            if found and kind not in self.rule.tokens:
                raise BadSample(f"a {_NAMES[kind]}, but this model takes none", "no_encoder")
        pictures = [self._picture(part.source) for part in sources["image"]]
        clips = [self._clip(part.source, part.sample_rate) for part in sources["audio"]]
        videos = [self._video(part.source, part.rate) for part in sources["video"]]
        items = {}
        if videos:
            items["video"] = self.rule.items("video", self.rule.videos(videos), ())
        if pictures:
            items["image"] = self.rule.items("image", self.rule.conversation_images(pictures), ())
        if clips:
            items["audio"] = self.rule.items("audio", self.rule.audio(clips), ())
        transforms = [self.rule.transform((p.shape[1], p.shape[0])) for p in pictures]
        plain = [self._plain(m, parts, transforms) for m, parts in zip(messages, read, strict=True)]
        return plain, items, transforms

    def _plain(
        self, message: Message | Mapping[str, Any], parts: Sequence[Part], transforms: Sequence[Transform]
    ) -> dict[str, Any]:
        """What the template sees: no media, and boxes as text."""
        if isinstance(message, Message):
            rest, whole = {"role": message.role}, all(isinstance(part, Text) for part in parts)
        else:
            rest = {key: value for key, value in message.items() if key not in ("content", "task")}
            if message.get("content") is None:
                return rest
            whole = isinstance(message["content"], str)
        if whole:
            return rest | {"content": "".join(part.text for part in parts)}
        content: list[dict[str, str]] = []
        for k, part in enumerate(parts):
            if isinstance(part, Text) and k and isinstance(parts[k - 1], Box):
                content[-1]["text"] += part.text
            elif isinstance(part, Text):
                content.append({"type": "text", "text": part.text})
            elif isinstance(part, Box):
                if part.image >= len(transforms):
                    raise BadSample(
                        f"a box in picture {part.image}, but there are {len(transforms)}", "bad_box"
                    )
                text = self.rule.write_box(part, transforms[part.image])
                if content and content[-1]["type"] == "text":  # a box is a word of the text around it
                    content[-1]["text"] += text
                else:
                    content.append({"type": "text", "text": text})
            else:
                kind = next(kind for kind, of in KINDS.items() if isinstance(part, of))
                content.append({"type": kind, kind: kind})
        if self.rule.joined is not None:
            texts = [
                part["text"] if part["type"] == "text" else self.rule.placeholders[part["type"]]
                for part in content
            ]
            return rest | {"content": self.rule.joined.join(texts)}
        return rest | {"content": content}

    def _picture(self, source: Any) -> np.ndarray:
        return np.asarray(decode_image(source, MAX_PIXELS, plain=True))

    def _video(self, source: Any, rate: float | None) -> tuple[np.ndarray, float | None]:
        frames, found = decode_video(source)
        return frames, rate or found

    def _clip(self, source: Any, rate: int | None) -> np.ndarray:
        return decode_audio(source, self.rule.sample_rate, rate)

    def _example(self, text: str, items: Items, transforms: list[Transform], **names: str) -> Example:
        text, items = self._expand(text, items)
        text, spans = unmark(text)
        ids, places = self._encode(text)
        weights = np.zeros(len(ids), np.float32)
        for start, end in spans:
            weights += [a < end and b > start for a, b in places]
        told = self.rule.told(self._without(text, spans), items)
        example = assemble(
            self.rule, np.array(ids, np.int32), told, weights=weights, transforms=transforms, **names
        )
        if not self.rule.pieces:
            return example
        return dataclasses.replace(
            example, tokens=np.where(example.tokens == NOWHERE, self._fill, example.tokens)
        )

    def _encode(self, text: str) -> tuple[Sequence[int], list[tuple[int, int]]]:
        """Ids, and the (start, end) of each in the text."""
        # what the reference's processors put around a text, unless the template has; its tokenizers for text alone put
        # nothing there
        begin = self.tokenizer.named.get("bos_token")
        if not self.rule.pieces:
            bare = re.sub(f"^({'|'.join(map(re.escape, self._tokens.values()))})+", "", text)
            around = bool(self.rule.tokens) and not (begin and bare.startswith(begin))
            return self.tokenizer.encode_places(text, around)
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        at, pieces = 0, re.split(f"({MEDIA}+)", text)
        bare = self.rule.pieces == "every" and not any(pieces[::2])
        for k, piece in enumerate(pieces):
            if k % 2:
                ids += [NOWHERE] * len(piece)
                places += [(at + n, at + n + 1) for n in range(len(piece))]
            elif piece or (k == 0 and self.rule.pieces == "first") or (bare and k == len(pieces) - 1):
                around = (k == 0 or self.rule.pieces == "every") and not (begin and piece.startswith(begin))
                found, where = self.tokenizer.encode_places(piece, around)
                ids += found
                places += [(at + a, at + b) if a < b else (0, 0) for a, b in where]
            at += len(piece)
        return ids, places

    def _without(self, text: str, spans: Sequence[tuple[int, int]]) -> str:
        """The text without media tokens and what is in the spans."""
        kept, at = [], 0
        for start, end in [*spans, (len(text), len(text))]:
            kept.append(text[at:start])
            at = end
        found = "".join(kept)
        for token in self._tokens.values():
            found = found.replace(token, "")
        return found

    def _expand(self, text: str, items: Items) -> tuple[str, Items]:
        """The text with media tokens for each placeholder, and the items by the kind whose token they have."""
        placeholders = {self.rule.placeholders.get(kind, token): kind for kind, token in self._tokens.items()}
        if not placeholders:
            return text, items
        left = {kind: list(reversed(items.get(kind, ()))) for kind in self._tokens}
        pieces = re.split("(" + "|".join(map(re.escape, placeholders)) + ")", text)
        for kind, media in left.items():
            count = sum(placeholders.get(piece) == kind for piece in pieces[1::2])
            if count != len(media):
                raise BadSample(
                    f"{len(media)} of {_NAMES[kind]} in the messages, but the text has {count} of their placeholders",
                    "placeholder_mismatch",
                )
        placed: Items = {}
        for k in range(1, len(pieces), 2):
            kind = placeholders[pieces[k]]
            item = left[kind].pop()
            placed.setdefault(self.rule.shared.get(kind, kind), []).append(item)
            written = item.text or MEDIA * len(item.index)
            pieces[k] = written.replace(MEDIA, self._tokens[kind])
        return "".join(pieces), placed

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the media tokens of a picture of (width, height), over what the encoder gets of it.

        Raises UserError where they have no place, as learned queries.
        """
        found = self.rule.grid(size) or (self.layout.image_grid if self.layout else (0, 0))
        if not all(found):
            raise UserError("media tokens of this model stand for no places of a picture")
        return found

    def name_id(self, word: str) -> int:
        """The token that begins the name in a label word, inside of a sentence; -1 for a word that is none (see
        `mm_jax.data.messages.Region`)."""
        name = word.rpartition("_")[2]
        if word.startswith("_") or not name:
            return -1
        ids, places = self.tokenizer.encode_places(f"a {name}")
        return next(token for token, (_, end) in zip(ids, places, strict=True) if end > len("a "))

    def preprocess(self, images: Sequence = (), audio: Sequence = (), videos: Sequence = ()) -> Arrays:
        """The media arrays alone, as the reference's processor returns them.

        images: anything that `Image` takes. audio: anything that `Audio` takes, or (samples, rate in Hz).
        videos: anything that `Video` takes, or (source, frames a second).
        """
        arrays = {}
        if len(videos):
            given = [video if isinstance(video, tuple) else (video, None) for video in videos]
            arrays |= self.rule.videos([self._video(*video) for video in given])
        if len(images):
            arrays |= self.rule.images([self._picture(image) for image in images])
        if len(audio):
            clips = [clip if isinstance(clip, tuple) else (clip, None) for clip in audio]
            arrays |= self.rule.audio([self._clip(clip, rate) for clip, rate in clips])
        return arrays

    def parts(self, ids: Sequence[int], transforms: Sequence[Transform] = ()) -> list[Part]:
        """Generated ids to text and, where the family writes boxes, boxes in pixels of the original pictures."""
        return self.rule.parse(self._reader.decode(ids), transforms)

    @cached_property
    def _reader(self) -> PretrainedTokenizer:
        """The tokenizer that writes answers as text."""
        return self.tokenizer.keeping(self.rule.kept) if self.rule.kept else self.tokenizer

    def shown(self, ids: Sequence[int]) -> str:
        """Ids as text with all special tokens."""
        return self.tokenizer.decode(ids, special=True)

    def complete(self, ids: Sequence[int]) -> list[int]:
        """The ids whose text can be shown already: a box that has begun waits for its end."""
        ids = list(ids)
        if not self.rule.opening:
            return ids
        found = re.finditer(self.rule.opening, self._reader.decode(ids))
        start = next((match.start() for match in found if match["begun"]), None)
        while start is not None and ids and len(self._reader.decode(ids)) > start:
            ids.pop()
        return ids


def assemble(
    rule: MediaRule,
    tokens: np.ndarray,
    items: Mapping[str, Sequence[Item]],
    *,
    weights: np.ndarray | None = None,
    **fields: Any,
) -> Example:
    """One conversation of tokens int32 [T] whose media tokens take the features of the items.

    Raises UserError when there are more or fewer media tokens than the items take.
    """
    placed: list[tuple[int, Item, np.ndarray]] = []
    for kind, token in rule.tokens.items():
        if kind in rule.shared:
            continue
        places, found = np.flatnonzero(tokens == token), items.get(kind, ())
        ends = np.cumsum([0] + [len(item.index) for item in found])
        if ends[-1] != len(places):
            raise UserError(f"the {kind} tokens in the text are {len(places)}, the media take {ends[-1]}")
        for item, start, end in zip(found, ends[:-1], ends[1:], strict=True):
            at = places[start:end]
            placed.append((int(at[0]) if len(at) else len(tokens), item, at))
    placed.sort(key=lambda entry: entry[0])
    index = {group: np.full(len(tokens), -1, np.int32) for group in ("image", "audio")}
    features = {"image": 0, "audio": 0}
    taps = None
    if rule.taps:
        taps = np.zeros((len(tokens), TAPS), np.int32), np.zeros((len(tokens), TAPS), np.float32)
        taps[1][:, 0] = 1
    arrays: dict[str, list[np.ndarray]] = {}
    for _, item, at in placed:
        group = "audio" if "audio_values" in item.arrays else "image"
        index[group][at] = np.where(item.index >= 0, item.index + features[group], item.index)
        features[group] += item.features
        if item.taps is not None:
            taps[0][at], taps[1][at] = item.taps
        for name, array in item.arrays.items():
            before = arrays.setdefault(name, [])
            if name.endswith("segment_ids"):  # numbers go on behind those of the items before
                array = np.where(array > 0, array + max((a.max(initial=0) for a in before), default=0), 0)
            before.append(array)
    joined = {name: np.concatenate(found) for name, found in arrays.items()}
    audio = {name: joined.pop(name) for name in ("audio_values", "audio_frames") if name in joined}
    pixels = (
        joined.pop("pixel_values") if set(joined) == {"pixel_values"} else np.zeros((0, 0, 0, 3), np.float32)
    )
    return Example(
        tokens=tokens,
        loss_weights=np.zeros(len(tokens), np.float32) if weights is None else weights,
        segments=np.ones(len(tokens), np.int32),
        positions=rule.positions(tokens, items),
        image_index=index["image"],
        audio_index=index["audio"],
        pixel_values=pixels,
        audio_values=audio.get("audio_values", np.zeros((0, 0, 0), np.float32)),
        audio_frames=audio.get("audio_frames", np.zeros(0, np.int32)),
        slots=joined,
        taps=taps,
        seen=rule.seen(tokens, items),
        **fields,
    )
