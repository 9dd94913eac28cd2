"""Conversations to examples and generated ids back to parts: the one place that joins rules and tokens."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from mm_jax.data.audio import AudioRule
from mm_jax.data.boxes import BoxFormat
from mm_jax.data.example import Example
from mm_jax.data.image import ImageRule, Transform
from mm_jax.data.media import MAX_PIXELS, MediaError, decode_audio, decode_image, image_size
from mm_jax.data.messages import Audio, BadSample, Box, Conversation, Image, Message, Part, Text, Video
from mm_jax.data.targets import CENTRE, NAMES, TargetRule, token_names
from mm_jax.data.template import Span, Template
from mm_jax.data.tokenizer import AUDIO, END, IMAGE, PAD, Tokenizer, spaced, train_tokenizer
from mm_jax.errors import UserError
from mm_jax.serialize import from_json, to_json

AnswerWeight = Literal["token", "sqrt", "answer"]
POWERS: dict[str, float] = {"token": 0.0, "sqrt": 0.5, "answer": 1.0}


@dataclass(frozen=True)
class ProcessorConfig:
    """image, audio: None where the model has no such encoder. box_bins: number of location tokens.

    max_pixels: larger pictures are refused before decoding. answer_weight: "token" weighs each token of an
    answer 1, "sqrt" each of n tokens 1 / sqrt(n), so that long answers do not drown the short ones, and "answer" 1 / n,
    so that every answer counts the same (the three reductions of InternVL's trainer: token, square, sample).
    """

    image: ImageRule | None = ImageRule()
    audio: AudioRule | None = AudioRule()
    targets: TargetRule = TargetRule()
    box_bins: int = 64
    max_pixels: int = MAX_PIXELS
    answer_weight: AnswerWeight = "token"

    def __post_init__(self) -> None:
        if self.answer_weight not in POWERS:
            raise UserError(f'answer_weight is one of {", ".join(POWERS)}, not "{self.answer_weight}"')
        if self.max_pixels < 1:
            raise UserError("max_pixels must be at least 1")


@dataclass(frozen=True)
class _Media:
    """The decoded media of one conversation."""

    pixel_values: np.ndarray  # float32 [n, H, W, 3]
    transforms: list[Transform]
    audio_values: np.ndarray  # float32 [m, F, mels]
    audio_frames: np.ndarray  # int32 [m]
    windows: list[range]  # the audio windows of each clip


class Processor:
    """Conversation -> Example, ids -> parts. Picklable and without state: safe in worker processes."""

    def __init__(self, config: ProcessorConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.template = Template(tokenizer)
        self.boxes = BoxFormat(config.box_bins, tokenizer.id("<loc_0>"))
        tokenizer.id(f"<loc_{config.box_bins - 1}>")  # raises for a tokenizer made for fewer bins
        self.pad_id = tokenizer.id(PAD)
        self.stop_ids = (tokenizer.id(END),)
        self._image_id, self._audio_id = tokenizer.id(IMAGE), tokenizer.id(AUDIO)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def example(
        self,
        conversation: Conversation,
        *,
        media: bool = True,
        text: bool = True,
        targets: bool = False,
        names: bool = False,
    ) -> Example:
        """One training example. A conversation with `rejected` becomes a preference pair.

        media=False leaves pictures and clips out (language training); text=False keeps only their places
        (dense training); targets adds the dense targets; names adds what each media token shows.

        In a preference pair segment 1 is the conversation and 2 the same with the rejected answer; only these
        two last answers are trainable, every token with weight 1, whatever answer_weight says.

        Raises:
            BadSample: with a reason, one of: empty_conversation, empty_answer, no_trainable_token, no_media,
                placeholder_mismatch, bad_box, no_encoder, bad_conversation, or one of MediaError.
        """
        with _Named(conversation.id):
            if not conversation.messages:
                raise BadSample("the conversation is empty", "empty_conversation")
            decoded = self._media(conversation) if media else self._no_media()
            transforms = decoded.transforms
            if not media and any(isinstance(p, Box) for p in _all_parts(conversation)):
                transforms = self._sizes_only(conversation)
            spans = self._spans(conversation, transforms, media)
            if text:
                _check_answers(conversation.messages)
            else:
                spans = [[span for span in spans[0] if span.media]]
                if not spans[0]:
                    raise BadSample("neither picture nor clip to train an encoder on", "no_media")
            pair = conversation.rejected is not None
            power = 0.0 if pair else POWERS[self.config.answer_weight]
            example = self._assemble(spans, decoded, power, conversation.id, conversation.source)
            if targets or names:
                labelled = self._with_targets(example, conversation, decoded)
                example = labelled if targets else example
                if names:
                    example = dataclasses.replace(example, names=self._names(labelled))
            return example

    def prompt(self, messages: Conversation | Sequence[Message]) -> Example:
        """Everything up to and including the header of the answer to come; nothing is trainable.

        Raises BadSample: no message, or the last one is an assistant's already, or what `example` raises.
        """
        conversation = messages if isinstance(messages, Conversation) else Conversation(tuple(messages))
        with _Named(conversation.id):
            if not conversation.messages:
                raise BadSample("the conversation is empty", "empty_conversation")
            if conversation.messages[-1].role == "assistant":
                raise BadSample("the last message of a prompt must not be an answer", "bad_conversation")
            decoded = self._media(conversation)
            box_ids = self._box_writer(decoded.transforms)
            spans = self.template.render(conversation.messages, box_ids, answer_header=True)
            spans = [dataclasses.replace(span, trainable=False) for span in spans]
            return self._assemble([spans], decoded, 0.0, conversation.id, conversation.source)

    def parts(self, ids: Sequence[int], transforms: Sequence[Transform] = ()) -> list[Part]:
        """Generated ids to text and boxes; other special tokens are left out.

        Boxes are in original pixels of the first picture. Location tokens that make no whole box, or all of
        them where `transforms` is empty, stay visible as text: "<loc_3>".
        """
        ids = [int(k) for k in ids]
        parts: list[Part] = []
        for is_location, group in itertools.groupby(ids, self.boxes.is_location):
            run = list(group)
            if not is_location:
                text = self.tokenizer.decode(run)
                text = text if parts else text.removeprefix(" ")  # of `spaced`
                parts += [Text(text)] if text else []
                continue
            whole = len(run) // 4 * 4 if transforms else 0
            for k in range(0, whole, 4):
                parts.append(Box(transforms[0].inverse(self.boxes.decode(run[k : k + 4]))))
            if run[whole:]:
                names = "".join(f"<loc_{k - self.boxes.first_id}>" for k in run[whole:])
                parts.append(Text(names))
        return parts

    def text(self, ids: Sequence[int], transforms: Sequence[Transform] = ()) -> str:
        """Generated ids as one string, boxes as "[x0, y0, x1, y1]" in whole original pixels."""
        pieces = []
        for part in self.parts(ids, transforms):
            is_box = isinstance(part, Box)
            pieces.append("[" + ", ".join(str(round(v)) for v in part.box) + "]" if is_box else part.text)
        return "".join(pieces)

    def shown(self, ids: Sequence[int]) -> str:
        """`text`, to show what a model reads."""
        return self.text(ids)

    def complete(self, ids: Sequence[int]) -> list[int]:
        """The ids without location tokens at the end that are not a whole box yet."""
        tail = 0
        while tail < len(ids) and self.boxes.is_location(ids[-1 - tail]):
            tail += 1
        return list(ids[: len(ids) - tail % 4])

    def preprocess(self, images: Sequence = (), audio: Sequence = ()) -> dict[str, np.ndarray]:
        """The media arrays alone: pixel_values [n, H, W, 3]; audio_values [m, F, mels], audio_frames [m].

        images: anything that `Image` takes. audio: anything that `Audio` takes, or (samples, rate in Hz).
        """
        arrays: dict[str, np.ndarray] = {}
        if len(images):
            rule = self.config.image
            arrays["pixel_values"] = np.stack([rule(decode_image(image))[0] for image in images])
        if len(audio):
            rule = self.config.audio
            clips = [clip if isinstance(clip, tuple) else (clip, None) for clip in audio]
            windows = [w for clip, rate in clips for w in rule(decode_audio(clip, rule.sample_rate, rate))]
            arrays["audio_values"] = np.stack([values for values, _ in windows])
            arrays["audio_frames"] = np.array([frames for _, frames in windows], np.int32)
        return arrays

    def save(self, directory: str | Path) -> None:
        """Writes processor.json and tokenizer.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "processor.json").write_text(json.dumps(to_json(self.config), indent=2) + "\n")
        self.tokenizer.save(directory / "tokenizer.json")

    @classmethod
    def load(cls, directory: str | Path) -> Processor:
        """Raises UserError: missing or damaged file, unknown field."""
        path = Path(directory) / "processor.json"
        try:
            config = from_json(ProcessorConfig, json.loads(path.read_text()), "processor")
        except OSError as error:
            raise UserError(f"{path}: cannot read the processor ({error.strerror})") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return cls(config, Tokenizer.load(path.with_name("tokenizer.json")))

    def _media(self, conversation: Conversation) -> _Media:
        images, clips = conversation.images(), conversation.audio()
        if any(isinstance(part, Video) for part in conversation.parts()):
            raise BadSample("a video, but this model takes none", "no_encoder")
        none = self._no_media()
        pixel_values, transforms = none.pixel_values, []
        if images:
            if self.config.image is None:
                raise BadSample("a picture, but the model has no image encoder", "no_encoder")
            made = []
            for k, image in enumerate(images):
                picture = _media(f"image {k}", decode_image, image.source, self.config.max_pixels)
                made.append(self.config.image(picture))
            pixel_values = np.stack([pixels for pixels, _ in made])
            transforms = [transform for _, transform in made]
        if not clips:
            return _Media(pixel_values, transforms, none.audio_values, none.audio_frames, [])
        if self.config.audio is None:
            raise BadSample("a clip, but the model has no audio encoder", "no_encoder")
        mels, frames, windows = [], [], []
        for k, clip in enumerate(clips):
            rate = self.config.audio.sample_rate
            samples = _media(f"audio {k}", decode_audio, clip.source, rate, clip.sample_rate)
            found = self.config.audio(samples)
            windows.append(range(len(mels), len(mels) + len(found)))
            mels += [mel for mel, _ in found]
            frames += [count for _, count in found]
        return _Media(pixel_values, transforms, np.stack(mels), np.array(frames, np.int32), windows)

    def _no_media(self) -> _Media:
        image, audio = self.config.image, self.config.audio
        pixels = np.zeros((0, image.height, image.width, 3) if image else (0, 0, 0, 3), np.float32)
        mels = np.zeros((0, audio.max_frames, audio.num_mels) if audio else (0, 0, 0), np.float32)
        return _Media(pixels, [], mels, np.zeros(0, np.int32), [])

    def _sizes_only(self, conversation: Conversation) -> list[Transform]:
        """Boxes without pictures still need to know where these would lie."""
        if self.config.image is None:
            raise BadSample("a box, but the model has no image encoder", "no_encoder")
        limit = self.config.max_pixels
        images = enumerate(conversation.images())
        sizes = [_media(f"image {k}", image_size, image.source, limit) for k, image in images]
        return [self.config.image.transform(size) for size in sizes]

    def _box_writer(self, transforms: Sequence[Transform]) -> Callable[[Box], tuple[int, ...]]:
        def write(box: Box) -> tuple[int, ...]:
            if not 0 <= box.image < len(transforms):
                text = f"a box in image {box.image}, but there are {len(transforms)} images"
                raise BadSample(text, "placeholder_mismatch")
            x0, y0, x1, y1 = box.box
            width, height = transforms[box.image].original
            if not (x0 < x1 and y0 < y1 and x1 > 0 and y1 > 0 and x0 < width and y0 < height):
                text = f"the box {list(box.box)} is empty or outside its {width} x {height} picture"
                raise BadSample(text, "bad_box")
            return self.boxes.encode(transforms[box.image].forward(box.box))

        return write

    def _spans(
        self, conversation: Conversation, transforms: Sequence[Transform], media: bool
    ) -> list[list[Span]]:
        """The spans of each segment."""
        box_ids = self._box_writer(transforms)
        chosen, rejected = conversation.messages, conversation.rejected
        if rejected is None:
            return [self.template.render(chosen, box_ids, media=media)]
        if chosen[-1].role != "assistant":
            raise BadSample("a preference pair must end with an assistant message", "no_trainable_token")
        if any(isinstance(part, Image | Audio | Video) for part in (*rejected, *chosen[-1].parts)):
            text = "the answers of a preference pair may hold text and boxes only"
            raise BadSample(text, "bad_conversation")
        worse = (*chosen[:-1], dataclasses.replace(chosen[-1], parts=rejected))
        segments = []
        for messages in (chosen, worse):
            spans = self.template.render(messages, box_ids, media=media)
            before = [dataclasses.replace(span, trainable=False) for span in spans[:-1]]
            segments.append([*before, spans[-1]])
        return segments

    def _assemble(
        self, segments: list[list[Span]], media: _Media, power: float, name: str, source: str
    ) -> Example:
        tokens: list[int] = []
        weights: list[float] = []
        image_runs: list[tuple[int, int, int]] = []  # (start in tokens, first feature, count)
        audio_runs: list[tuple[int, int, int]] = []
        lengths = []
        for segment in segments:
            begin = len(tokens)
            for span in segment:
                if span.media == "image":
                    count = self.config.image.num_tokens
                    image_runs.append((len(tokens), span.slot * count, count))
                    tokens += [self._image_id] * count
                elif span.media == "audio":
                    for window in media.windows[span.slot]:
                        count = self.config.audio.tokens(int(media.audio_frames[window]))
                        audio_runs.append((len(tokens), window * self.config.audio.num_tokens, count))
                        tokens += [self._audio_id] * count
                else:
                    tokens += span.ids
                weight = len(span.ids) ** -power if span.trainable else 0.0
                weights += [weight] * (len(tokens) - len(weights))
            lengths.append(len(tokens) - begin)
        return Example(
            tokens=np.array(tokens, np.int32),
            loss_weights=np.array(weights, np.float32),
            segments=np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths),
            positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            image_index=_index(len(tokens), image_runs),
            audio_index=_index(len(tokens), audio_runs),
            pixel_values=media.pixel_values,
            audio_values=media.audio_values,
            audio_frames=media.audio_frames,
            transforms=media.transforms,
            source=source,
            id=name,
        )

    def _with_targets(self, example: Example, conversation: Conversation, media: _Media) -> Example:
        rule = self.config.targets
        cells, words = math.prod(rule.image_grid), len(rule.labels)
        image_labels = np.zeros((example.num_images, cells, words), np.uint8)
        image_boxes = np.full((example.num_images, cells, 4), -1, np.int32)
        audio_labels = np.zeros((example.num_audio, rule.audio_positions, words), np.uint8)
        if example.num_images:
            for k, image in enumerate(conversation.images()):
                if image.regions:
                    image_labels[k], image_boxes[k] = rule.image(image.regions, media.transforms[k])
        for clip, windows in zip(conversation.audio() if media.windows else (), media.windows, strict=True):
            if clip.regions:
                found = rule.audio(clip.regions, len(windows), self.config.audio.window_seconds)
                audio_labels[windows.start : windows.stop] = found
        return dataclasses.replace(
            example, image_labels=image_labels, image_boxes=image_boxes, audio_labels=audio_labels
        )

    def _names(self, labelled: Example) -> np.ndarray:
        """int32 [T, NAMES]: the names of the labels behind each media token."""
        found = np.full((labelled.length, NAMES), -1, np.int32)
        rule = self.config.targets
        parts = []
        if labelled.num_images:
            of_slots = token_names(labelled.image_labels, rule.image_grid, rule.image_block, self._label_ids)
            parts.append((labelled.image_index, of_slots))
        if labelled.num_audio:
            positions, tokens = rule.audio_positions, self.config.audio.num_tokens
            block = (positions // tokens, 1)
            of_slots = token_names(labelled.audio_labels, (positions, 1), block, self._label_ids)
            parts.append((labelled.audio_index, of_slots))
        for index, of_slots in parts:
            found[index >= 0] = of_slots.reshape(-1, NAMES)[index[index >= 0]]
        return found

    @cached_property
    def _label_ids(self) -> np.ndarray:
        """The first token of each label's name, -1 for a label that is none (see `Region`)."""
        words = self.config.targets.labels
        said = [None if w.startswith("_") else spaced(w.rpartition("_")[2]) for w in words]
        return np.array([-1 if text is None else self.tokenizer.encode(text)[0] for text in said], np.int32)


class _Named:
    """Puts the sample's id before what was wrong with it."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BadSample) and self.name:
            raise BadSample(f'sample "{self.name}": {error}', error.reason) from None


def _media(name: str, decode: Callable, *args):
    try:
        return decode(*args)
    except MediaError as error:
        raise MediaError(f"{name}: {error}", error.reason) from None


def _check_answers(messages: Sequence[Message]) -> None:
    """An answer of nothing would teach the model to say nothing."""
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise BadSample("no assistant message to train on", "no_trainable_token")
    for answer in answers:
        if not any(not isinstance(part, Text) or part.text.strip() for part in answer.parts):
            raise BadSample("an assistant message is empty", "empty_answer")


def _all_parts(conversation: Conversation) -> Iterable[Part]:
    return itertools.chain(conversation.parts(), conversation.rejected or ())


def _index(length: int, runs: list[tuple[int, int, int]]) -> np.ndarray:
    index = np.full(length, -1, np.int32)
    for start, first, count in runs:
        index[start : start + count] = np.arange(first, first + count)
    return index


def fit_processor(
    config: ProcessorConfig, conversations: Iterable[Conversation], vocab_size: int
) -> Processor:
    """Trains the tokenizer on the text and, where config names none, collects the label words (sorted).

    Deterministic: the same conversations give the same processor, in whatever order the words appear.
    Raises UserError if vocab_size is too small for the fixed tokens.
    """
    texts: list[str] = []
    words: set[str] = set()
    for conversation in conversations:
        for part in _all_parts(conversation):
            if isinstance(part, Text):
                texts.append(spaced(part.text))
            elif isinstance(part, Image | Audio):
                for region in part.regions:
                    words.update(region.label.split())
    targets = config.targets
    if not targets.labels:
        targets = dataclasses.replace(targets, labels=tuple(sorted(words | {CENTRE} if words else words)))
    config = dataclasses.replace(config, targets=targets)
    return Processor(config, train_tokenizer(texts, vocab_size, config.box_bins))
