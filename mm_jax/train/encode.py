"""How a stage turns a conversation into an Example; small, picklable, so that workers can have it."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mm_jax.data.example import Example
from mm_jax.data.messages import Conversation
from mm_jax.data.processor import Processor

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
    def of(cls, processor: Processor, stage: "Stage") -> "Encode":
        """The encoding of a stage: a dense stage needs targets and no text."""
        config = dataclasses.replace(processor.config, answer_weight=stage.answer_weight)
        dense = stage.loss == "dense"
        return cls(Processor(config, processor.tokenizer), stage.media, not dense, dense, stage.naming > 0)

    def __call__(self, conversation: Conversation) -> Example:
        return self.processor.example(
            conversation, media=self.media, text=self.text, targets=self.targets, names=self.names
        )
