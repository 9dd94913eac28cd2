"""How a stage turns a conversation into an Example; small, picklable, so that workers can have it."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mm_jax.data.example import Example
from mm_jax.data.messages import Audio, BadSample, Conversation, Image, Video
from mm_jax.data.pretrained import PretrainedProcessor
from mm_jax.data.processor import POWERS, AnswerWeight, Processor
from mm_jax.data.targets import NAMES, TargetRule, token_names

if TYPE_CHECKING:  # worker processes import this module: they need no jax
    from mm_jax.train.config import Stage


@dataclass(frozen=True)
class Encode:
    """`processor.example` with the switches of a stage."""

    processor: Processor
    media: bool
    text: bool
    targets: bool
    names: bool

    @classmethod
    def of(cls, processor: Processor | PretrainedProcessor, stage: "Stage") -> "Encode | PretrainedEncode":
        """The encoding of a stage: a dense stage needs targets and no text."""
        if isinstance(processor, PretrainedProcessor):
            if stage.template:
                processor = processor.with_template(stage.template)
            return PretrainedEncode(processor, stage.media, stage.answer_weight, stage.naming > 0)
        config = dataclasses.replace(processor.config, answer_weight=stage.answer_weight)
        dense = stage.loss == "dense"
        return cls(Processor(config, processor.tokenizer), stage.media, not dense, dense, stage.naming > 0)

    def __call__(self, conversation: Conversation) -> Example:
        return self.processor.example(
            conversation, media=self.media, text=self.text, targets=self.targets, names=self.names
        )


@dataclass(frozen=True)
class PretrainedEncode:
    """The same with the tokenizer and template of a checkpoint, which have no dense targets."""

    processor: PretrainedProcessor
    media: bool
    answer_weight: AnswerWeight
    names: bool = False
    targets: ClassVar[bool] = False

    def __call__(self, conversation: Conversation) -> Example:
        """Raises BadSample for what cannot be trained on."""
        if not self.media:
            conversation = text_alone(conversation)
        if conversation.rejected is not None:
            example = self._pair(conversation)
        else:
            example = self.processor.example(conversation)
        if not example.loss_weights.any():
            raise BadSample("no answer to train on", "no_trainable_token")
        weights = by_length(example.loss_weights, POWERS[self.answer_weight])
        names = self._names(example, conversation) if self.names else None
        return dataclasses.replace(example, loss_weights=weights, names=names)

    def _pair(self, conversation: Conversation) -> Example:
        """Segment 1 with the last answer, segment 2 with the rejected one in its place, over the same media."""
        *before, last = conversation.messages
        if last.role != "assistant":
            raise BadSample("a preference pair must end with an assistant message", "no_trainable_token")
        if any(isinstance(part, Image | Audio | Video) for part in (*conversation.rejected, *last.parts)):
            raise BadSample(
                "the answers of a preference pair may hold text and boxes only", "bad_conversation"
            )
        answers = (last, dataclasses.replace(last, parts=conversation.rejected))
        chosen, worse = (
            last_answer(
                self.processor.example(
                    dataclasses.replace(conversation, messages=(*before, answer), rejected=None)
                )
            )
            for answer in answers
        )
        names = ("tokens", "loss_weights", "positions", "image_index", "audio_index", "seen")
        joined = {
            name: np.concatenate([getattr(chosen, name), getattr(worse, name)])
            for name in names
            if getattr(chosen, name) is not None
        }
        if chosen.taps is not None:
            joined["taps"] = tuple(map(np.concatenate, zip(chosen.taps, worse.taps, strict=True)))
        return dataclasses.replace(
            chosen, segments=np.concatenate([chosen.segments, worse.segments + 1]), **joined
        )

    def _names(self, example: Example, conversation: Conversation) -> np.ndarray:
        """int32 [T, NAMES]: first tokens of what the regions say is where each media token of a picture is."""
        found = np.full((example.length, NAMES), -1, np.int32)
        here, at = np.flatnonzero(example.image_index >= 0), 0
        for image, transform in zip(conversation.images(), example.transforms, strict=True):
            grid = self.processor.grid(transform.original)
            count = math.prod(grid)
            if image.regions:
                words = tuple(sorted({word for region in image.regions for word in region.label.split()}))
                rule = TargetRule(labels=words, image_grid=grid)
                labels, _ = rule.image(image.regions, self.processor.rule.framing(transform.original))
                ids = np.array([self.processor.name_id(word) for word in words], np.int32)
                found[here[at : at + count]] = token_names(labels[None], grid, (1, 1), ids)[0]
            at += count
        if at != len(here):
            raise BadSample(
                "media tokens of videos or tiles have no place of their own to be named", "no_place"
            )
        return found


def last_answer(example: Example) -> Example:
    """Of the answers only the last one is trained on."""
    weights = example.loss_weights.copy()
    trained = np.flatnonzero(weights > 0)
    if len(trained):
        before = np.flatnonzero(weights[: trained[-1]] == 0)
        weights[: before[-1] + 1 if len(before) else 0] = 0
    return dataclasses.replace(example, loss_weights=weights)


def text_alone(conversation: Conversation) -> Conversation:
    """Without media."""
    messages = (
        dataclasses.replace(m, parts=tuple(p for p in m.parts if not isinstance(p, Image | Audio | Video)))
        for m in conversation.messages
    )
    return dataclasses.replace(conversation, messages=tuple(messages))


def by_length(weights: np.ndarray, power: float) -> np.ndarray:
    """Each of the n tokens of an answer weighs n ** -power.

    >>> by_length(np.array([0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0]), 0.5).tolist()
    [0.0, 0.5, 0.5, 0.5, 0.5, 0.0, 1.0]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights > 0, [0]]).astype(int)))
    found = weights.copy()
    for start, end in edges.reshape(-1, 2):
        found[start:end] = (end - start) ** -power
    return found
