"""How messages are written as tokens, and which of the tokens a model is trained to write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mm_jax.data.messages import Box, Image, Message, Text
from mm_jax.data.tokenizer import ASSISTANT, END, SYSTEM, USER, Tokenizer, spaced


@dataclass(frozen=True)
class Span:
    """Tokens that belong together: ids, or the place of the slot-th picture or clip (then ids is empty)."""

    ids: tuple[int, ...] = ()
    media: str = ""  # "image", "audio" or "" for ids
    slot: int = -1
    trainable: bool = False


class Template:
    """`<|user|>` parts `<|end|>` `<|assistant|>` answer `<|end|>`, in the manner of ChatML.

    Trainable are the tokens of an answer and the `<|end|>` after it: the model writes both, while everything
    else is given to it. Pictures and clips are counted through the whole conversation. With w = trainable:

        <|user|> [image 0] what is it ? <|end|> <|assistant|> a cat <|end|>
                                                              w w   w
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.headers = {
            "system": (tokenizer.id(SYSTEM),),
            "user": (tokenizer.id(USER),),
            "assistant": (tokenizer.id(ASSISTANT),),
        }
        self.end = (tokenizer.id(END),)

    def render(
        self,
        messages: Sequence[Message],
        box_ids: Callable[[Box], tuple[int, ...]],
        *,
        media: bool = True,
        answer_header: bool = False,
    ) -> list[Span]:
        """Messages to spans. box_ids writes a box; media=False leaves pictures and clips out.

        answer_header ends with the `<|assistant|>` that a prompt for generation needs.
        """
        spans: list[Span] = []
        slots = {"image": 0, "audio": 0}
        encode = self.tokenizer.encode
        for message in messages:
            trainable = message.role == "assistant"
            spans.append(Span(self.headers[message.role]))
            ids: tuple[int, ...] = ()
            for part in message.parts:
                if isinstance(part, Text):
                    ids += encode(spaced(part.text))
                elif isinstance(part, Box):
                    ids += box_ids(part)
                elif media:
                    if ids:
                        spans.append(Span(ids, trainable=trainable))
                        ids = ()
                    kind = "image" if isinstance(part, Image) else "audio"
                    spans.append(Span(media=kind, slot=slots[kind]))
                    slots[kind] += 1
            spans.append(Span(ids + self.end, trainable=trainable))
        if answer_header:
            spans.append(Span(self.headers["assistant"]))
        return spans
