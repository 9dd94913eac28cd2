"""How a stage turns a conversation into an Example; small, picklable, so that workers can have it."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mm_jax.data.example import Example
from mm_jax.data.messages import Audio, BadSample, Conversation, Image, Video
from mm_jax.data.pretrained import PretrainedProcessor
from mm_jax.data.processor import POWERS, AnswerWeight, Processor

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
            return PretrainedEncode(processor, stage.media, stage.answer_weight)
        config = dataclasses.replace(processor.config, answer_weight=stage.answer_weight)
        dense = stage.loss == "dense"
        return cls(Processor(config, processor.tokenizer), stage.media, not dense, dense, stage.naming > 0)

    def __call__(self, conversation: Conversation) -> Example:
        return self.processor.example(
            conversation, media=self.media, text=self.text, targets=self.targets, names=self.names
        )


@dataclass(frozen=True)
class PretrainedEncode:
    """The same with the tokenizer and template of a checkpoint, which have neither dense targets nor names."""

    processor: PretrainedProcessor
    media: bool
    answer_weight: AnswerWeight
    targets: ClassVar[bool] = False
    names: ClassVar[bool] = False

    def __call__(self, conversation: Conversation) -> Example:
        """Raises BadSample for what cannot be trained on."""
        if conversation.rejected is not None:
            raise BadSample("a preference pair, in a stage that has no use for it", "preference_pair")
        if not self.media:
            conversation = _text_alone(conversation)
        example = self.processor.example(conversation)
        if not example.loss_weights.any():
            raise BadSample("no answer to train on", "no_trainable_token")
        weights = by_length(example.loss_weights, POWERS[self.answer_weight])
        return dataclasses.replace(example, loss_weights=weights)


def _text_alone(conversation: Conversation) -> Conversation:
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
