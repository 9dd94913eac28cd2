"""Streaming, and chats of several turns that keep their cache."""

import numpy as np
import pytest

from mm_jax.data.messages import Audio, Box, Image, Message, Text
from mm_jax.errors import UserError
from mm_jax.inference.sampling import Sampling
from mm_jax.inference.text import TextStream, render
from tests.tiny import clip, picture, user

TURNS = [
    (Image(picture(0)), Text("what colour is the square")),
    (Text("how many are there"),),
    (Audio(clip(1), 16_000), Image(picture(1)), Text("is it the word you hear")),
    (Text("and now"),),
]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=50, seed=4)])
def test_a_session_answers_as_a_fresh_model_does(lm, sampling):
    session = lm.session()
    known = 0
    for turn in TURNS:
        messages = [*session.messages, Message("user", turn)]
        expected = lm.answer([messages], 10, sampling)[0]
        whole = lm.prompt(messages).length
        assert session.ask(turn, max_new_tokens=10, sampling=sampling) == expected
        # what was read before is not read again
        assert session.prefilled <= whole - known
        known = whole


def test_reset_and_changed_pictures_are_not_mixed_up(lm):
    """Two pictures have the same tokens: the cache of one must not answer for the other."""
    session = lm.session()
    session.ask(TURNS[0], max_new_tokens=6)
    session.messages = [user("what colour is the square", images=(2,))]
    asked = [*session.messages, Message("user", (Text("how many"),))]
    expected = lm.answer([asked], 6)[0]
    assert session.ask("how many", max_new_tokens=6) == expected
    session.reset()
    other = (Image(picture(1)), Text("what colour is the square"))
    assert session.ask(other, max_new_tokens=6) == lm.answer([[Message("user", other)]], 6)[0]


def test_an_interrupted_answer_stays_as_far_as_it_went(lm):
    session = lm.session()
    pieces = session.stream(TURNS[0], max_new_tokens=20)
    said = next(pieces)
    pieces.close()
    assert session.messages[-1].role == "assistant"
    assert render(session.messages[-1].parts).startswith(said)
    messages = [*session.messages, Message("user", TURNS[1])]
    assert session.ask(TURNS[1], max_new_tokens=6) == lm.answer([messages], 6)[0]


def test_a_refused_question_changes_nothing(lm):
    session = lm.session()
    session.ask("how many", max_new_tokens=4)
    before = list(session.messages)
    for bad in ("  ", "red " * 300, (Image("no such file.png"), Text("x"))):
        with pytest.raises(UserError):
            session.ask(bad)
    assert session.messages == before
    expected = lm.answer([[*before, Message("user", (Text("and"),))]], 4)[0]
    assert session.ask("and", max_new_tokens=4) == expected


@pytest.mark.parametrize("turn", TURNS)
def test_pieces_make_the_answer(lm, turn):
    messages = [Message("user", turn)]
    pieces = list(lm.stream(messages, 16))
    assert "".join(pieces).strip() == lm.chat(messages, 16)
    assert len(pieces) > 1


def test_the_same_programs_stream_and_generate(lm):
    messages = [Message("user", TURNS[1])]
    lm.chat(messages, 16)
    before = dict(lm.programs.traces)
    list(lm.stream(messages, 16))
    assert dict(lm.programs.traces) == before


def test_characters_are_not_cut(lm):
    """Bytes of one character that arrive one by one appear together."""
    tokenizer = lm.processor.tokenizer
    text = "naïve 模型 🙂 ok"
    ids = tokenizer.encode(text)
    stream = TextStream(lm.processor)
    pieces = [stream.push([i]) for i in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    assert "" in pieces, "the text should have characters of several tokens"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_that_never_ends_is_shown_at_last(lm):
    ids = lm.processor.tokenizer.encode("ab🙂")[:-1]
    stream = TextStream(lm.processor)
    assert "".join(stream.push([i]) for i in ids) == "ab"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_boxes_appear_whole_in_original_pixels(lm):
    picture_message = user("where", images=(0,))
    transforms = lm.prompt([picture_message]).transforms
    answer = Message("assistant", (Box((10, 6, 30, 18)),))
    example = lm.example([picture_message, answer])
    ids = example.tokens[example.loss_weights > 0][:4]
    stream = TextStream(lm.processor, transforms)
    pieces = [stream.push([int(i)]) for i in ids]
    assert pieces[:3] == ["", "", ""]
    box = [int(v) for v in pieces[3].strip("[]").split(",")]
    # 16 bins over the longer side of 40 pixels
    assert np.abs(np.array(box) - [10, 6, 30, 18]).max() <= 2.5


def test_a_box_without_area_does_not_end_the_chat(lm, monkeypatch):
    session = lm.session()
    empty = Box((3.0, 3.0, 3.0, 9.0))
    monkeypatch.setattr(lm.processor, "parts", lambda ids, transforms=(): [empty])
    session.ask(TURNS[0], max_new_tokens=3)
    monkeypatch.undo()
    assert session.messages[-1].parts == (Text("[3, 3, 3, 9]"),)
    session.ask("and now", max_new_tokens=3)


def test_render():
    assert render([Text("at"), Box((3.6, 8, 20, 40)), Text(" or"), Box((0, 0, 1, 1), 1)]) == (
        "at [4, 8, 20, 40] or [0, 0, 1, 1]"
    )
    assert render([]) == ""
