"""The spans of a conversation by literal example."""

import pytest

from mm_jax.data.messages import Audio, Box, Image, Message, Text
from mm_jax.data.template import Span, Template
from mm_jax.data.tokenizer import ASSISTANT, END, SYSTEM, USER, train_tokenizer

MESSAGES = (
    Message("system", (Text("short"),)),
    Message("user", (Image("a"), Text("where"), Audio("b"), Image("c"))),
    Message("assistant", (Text("at"), Box((0, 0, 1, 1)))),
    Message("user", (Text("how many"),)),
    Message("assistant", (Text("two"),)),
)


@pytest.fixture(scope="module")
def template():
    return Template(train_tokenizer([" short", " where", " at", " how many", " two"] * 4, 320, 4))


def test_spans(template):
    token, encode = template.tokenizer.id, template.tokenizer.encode
    end = (token(END),)
    system, user, assistant = ((token(name),) for name in (SYSTEM, USER, ASSISTANT))
    assert template.render(MESSAGES, lambda box: (70, 71, 72, 73)) == [
        Span(system),
        Span(encode(" short") + end),
        Span(user),
        Span(media="image", slot=0),
        Span(encode(" where")),
        Span(media="audio", slot=0),
        Span(media="image", slot=1),
        Span(end),
        Span(assistant),
        Span(encode(" at") + (70, 71, 72, 73) + end, trainable=True),
        Span(user),
        Span(encode(" how many") + end),
        Span(assistant),
        Span(encode(" two") + end, trainable=True),
    ]


def test_without_media(template):
    spans = template.render(MESSAGES, lambda box: (), media=False)
    assert not any(span.media for span in spans)
    assert spans[3] == Span(template.tokenizer.encode(" where") + (template.tokenizer.id(END),))


def test_a_prompt_ends_with_the_header_of_the_answer(template):
    spans = template.render(MESSAGES[3:4], lambda box: (), answer_header=True)
    assert spans[-1] == Span((template.tokenizer.id(ASSISTANT),))
    assert not any(span.trainable for span in spans)
