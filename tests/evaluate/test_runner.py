"""Asking held-out questions in batches, and the page about the answers."""

import base64
import io
import json
import re

import numpy as np
import PIL.Image
import pytest

from mm_jax.data.messages import Box, Conversation, Message, Text
from mm_jax.errors import UserError
from mm_jax.evaluate import report, runner
from mm_jax.inference.attention import attention_map
from mm_jax.inference.text import render
from tests.tiny import user

NEW = 6


def conversation(k: int) -> Conversation:
    kinds = [
        (user("what colour is the square", (k,)), Text("red"), "colour"),
        (user("where is the square", (k,)), Box((4, 4, 15, 15)), "grounding"),
        (user("which word do you hear", (), (k % 3,)), Text("blue"), "speech"),
        (user("how many"), Text("two"), "count"),
        (user("is there a circle", (k, k + 1)), Text("no"), "exists"),
    ]
    question, answer, task = kinds[k % len(kinds)]
    return Conversation((question, Message("assistant", (answer,), task)), id=f"c{k}")


class Broken(list):
    """A source whose second sample cannot be read."""

    def __getitem__(self, index):
        if index == 1:
            raise UserError("bad sample")
        return super().__getitem__(index)


SOURCE = [conversation(k) for k in range(23)]


@pytest.fixture(scope="module")
def asked(lm):
    questions = runner.read_questions({"mixed": SOURCE})
    return questions, *runner.ask(lm, questions, rows=4, max_new_tokens=NEW, progress=False)


def test_answers_come_in_order_and_are_those_of_single_questions(lm, asked):
    questions, answers, _ = asked
    assert [a.question for a in answers] == questions
    for k in (0, 1, 2, 3, 4, 21, 22):
        assert list(answers[k].parts) == lm.answer([questions[k].prompt], NEW)[0]


def test_blanked_models_do_not_see(asked):
    questions, answers, blanked = asked
    assert any(a.parts != b.parts for a, b in zip(answers, blanked, strict=True))
    # the same question about different pictures has the same blanked answer, and text needs no picture
    for task in ("colour", "exists"):
        found = {b.ids for q, b in zip(questions, blanked, strict=True) if q.task == task}
        assert len(found) == 1
    for question, answer, blank in zip(questions, answers, blanked, strict=True):
        if question.task == "count":
            assert answer.parts == blank.parts


def test_shapes_stay_the_same(lm, asked):
    questions, *_ = asked
    before = dict(lm.programs.traces)
    runner.ask(lm, questions, rows=4, max_new_tokens=NEW, progress=False)
    assert dict(lm.programs.traces) == before


def test_without_blanked(lm, asked):
    questions, answers, _ = asked
    again, blanked = runner.ask(lm, questions[:3], rows=4, max_new_tokens=NEW, blank=False, progress=False)
    assert blanked is None
    assert again == answers[:3]


def test_questions_of_a_dialogue():
    turns = (
        user("a"),
        Message("assistant", (Text("b"),), "t"),
        user("c"),
        Message("assistant", (Text("d"),)),
    )
    found = runner.questions_of(Conversation(turns), "s", 7)
    assert [(q.turn, q.task, len(q.prompt), q.text()) for q in found] == [
        (1, "t", 1, "a"),
        (3, "answer", 3, "c"),
    ]


def test_reading_a_part_and_a_broken_sample():
    found = runner.read_questions({"a": SOURCE}, limit=3)
    assert [q.index for q in found] == [0, 11, 22]
    assert [q.index for q in runner.read_questions({"a": Broken(SOURCE[:3])})] == [0, 2]
    with pytest.raises(UserError, match="no question"):
        runner.read_questions({"a": []})


def test_boxes_of_another_picture_are_no_answer():
    question = runner.Question("s", 0, 1, "", "grounding", (user("x"),), (Box((0, 0, 4, 4)),))
    sizes = ((8, 8), (8, 8))
    right = runner.Answer(question, (), (Box((0, 0, 4, 4)),), sizes).scored()
    other = runner.Answer(question, (), (Box((0, 0, 4, 4), 1),), sizes).scored()
    assert right.answer_box == (0, 0, 4, 4) and right.size == (8, 8)
    assert other.answer_box is None


def test_files(tmp_path, asked):
    _, answers, blanked = asked
    scores = {"run": "tiny"} | runner.score(answers, blanked)
    runner.write(tmp_path, scores, answers, blanked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "scores.json", "scores.md"]
    assert json.loads((tmp_path / "scores.json").read_text())["tasks"]["colour"]["n"] == 5
    lines = report.read_answers(tmp_path)
    assert len(lines) == len(SOURCE)
    assert lines[0]["question"] == "<image> what colour is the square"
    assert lines[0]["expected"] == "red"
    assert lines[0]["answer"] == render(answers[0].parts)
    assert lines[1]["expected_box"] == [4, 4, 15, 15]
    assert set(lines[0]) >= {"source", "index", "turn", "task", "right", "ids", "blanked_answer"}


def test_report(tmp_path, lm, asked):
    _, answers, blanked = asked
    scores = {"run": "<tiny>", "stage": "prefer", "split": "test"} | runner.score(answers, blanked)
    runner.write(tmp_path, scores, answers, blanked)
    PIL.Image.new("RGB", (30, 20), "white").save(tmp_path / "loss.png")
    path = report.write_report(tmp_path, lm, {"mixed": SOURCE}, samples=2)
    page = path.read_text(encoding="utf-8")
    assert "<h1>&lt;tiny&gt;</h1>" in page and "<tiny>" not in page
    for task in ("colour", "count", "exists", "grounding", "speech"):
        assert f"<h2>{task}" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    sizes = [PIL.Image.open(io.BytesIO(base64.b64decode(data))).size for data in pictures]
    assert (30, 20) in sizes and (320, 192) in sizes
    assert page.count("data:audio/wav;base64,") == page.count("which word do you hear")
    assert page.count("looked at for") > 0
    assert "loss curves" in page and "test question 1" in page and "first mistake" in page
    # the expected box is drawn into the picture in its colour
    pixels = [
        np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in pictures
    ]
    assert any((image == report.EXPECTED).all(axis=-1).any() for image in pixels)


def test_report_needs_an_evaluation(tmp_path):
    with pytest.raises(UserError, match="run first"):
        report.read_answers(tmp_path)
    (tmp_path / "answers.jsonl").write_text("{broken")
    with pytest.raises(UserError, match="damaged"):
        report.read_answers(tmp_path)


def test_choice_is_not_picked_by_result():
    lines = [
        {"task": "a", "right": right, "k": k} for k, right in enumerate([True, False, True, True, False])
    ]
    chosen = report.choose(lines, 2)["a"]
    assert [(line["k"], why) for line, why in chosen] == [
        (0, "test question 1"),
        (1, "test question 2"),
        (4, "first mistake after these"),
    ]


def test_attention_map_of_a_model(lm):
    messages = [user("what colour", (0, 1))]
    ids = lm.generate(lm.batch(messages), 3, ignore_eos=True)[0]
    for image in (0, 1):
        heat = attention_map(lm, messages, ids, slice(0, 2), image=image)
        assert heat.shape == (24, 40) and heat.max() == 1 and heat.min() >= 0
    prompt, weights = lm.attention(messages, ids)
    assert weights["decoder"].shape == (2, 4, prompt.length + 3, prompt.length + 3)
    np.testing.assert_allclose(weights["decoder"].sum(-1), 1, atol=1e-5)
    assert weights["image_projector"].shape == (2, 2, 4, 16)
    with pytest.raises(UserError, match="picture 2"):
        attention_map(lm, messages, ids, image=2)
    with pytest.raises(UserError, match="no such word"):
        attention_map(lm, messages, ids, slice(9, 10))


def test_first_word(lm):
    encode = lm.processor.tokenizer.encode
    for text, word in (("red circle", "red"), ("red", "red")):
        ids = encode(text)
        assert lm.processor.text(ids[report.first_word(lm, ids)]) == word
