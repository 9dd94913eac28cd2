"""Questions of held-out conversations, asked many at a time, with and without the media."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from mm_jax.data.messages import Audio, Box, Conversation, Image, Message, Part, Text
from mm_jax.data.sources import Source
from mm_jax.errors import UserError
from mm_jax.evaluate.metrics import Scored, is_right, markdown, summary
from mm_jax.inference.request import Request
from mm_jax.inference.text import answer_ids, render
from mm_jax.serialize import from_json, to_json

if TYPE_CHECKING:
    from mm_jax.data.example import Example
    from mm_jax.data.image import Transform
    from mm_jax.lm import LanguageModel


@dataclass(frozen=True)
class Question:
    """One assistant turn of a held-out conversation, to be answered after the true turns before it.

    index: of the conversation in its source; turn: of the assistant message in it.
    """

    source: str
    index: int
    turn: int
    id: str
    task: str
    prompt: tuple[Message, ...]
    expected: tuple[Part, ...]

    def text(self) -> str:
        """The last question, with <image> and <audio> where media are."""
        names = {Image: "<image>", Audio: "<audio>"}
        pieces = [
            p.text if isinstance(p, Text) else names.get(type(p)) or render([p])
            for p in self.prompt[-1].parts
        ]
        return " ".join(piece.strip() for piece in pieces)


@dataclass(frozen=True)
class Answer:
    """What was said to a question: ids without the stop token, and parts with boxes in original pixels."""

    question: Question
    ids: tuple[int, ...]
    parts: tuple[Part, ...]
    sizes: tuple[tuple[int, int], ...] = ()

    def scored(self) -> Scored:
        expected, answer = _box(self.question.expected), _box(self.parts)
        inside = expected is not None and expected.image < len(self.sizes)
        return Scored(
            self.question.task,
            self.question.source,
            render(self.question.expected),
            render(self.parts),
            expected.box if expected else None,
            # a box in another picture is no answer
            answer.box if answer and expected and answer.image == expected.image else None,
            self.sizes[expected.image] if inside else (0, 0),
        )


def _box(parts: Sequence[Part]) -> Box | None:
    return next((part for part in parts if isinstance(part, Box)), None)


def questions_of(conversation: Conversation, source: str, index: int) -> list[Question]:
    """Every assistant turn of a conversation as a question; turns without a task are of the task "answer"."""
    found = []
    for turn, message in enumerate(conversation.messages):
        if message.role == "assistant":
            before = conversation.messages[:turn]
            task = message.task or "answer"
            found.append(Question(source, index, turn, conversation.id, task, before, message.parts))
    return found


def read_questions(sources: dict[str, Source], limit: int = 0) -> list[Question]:
    """The questions of `limit` conversations a source (0: all), evenly spread; unusable ones are left out."""
    found: list[Question] = []
    for name, source in sources.items():
        count = min(limit, len(source)) if limit else len(source)
        for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)) if count else ():
            try:
                found += questions_of(source[int(index)], name, int(index))
            except UserError:
                continue
    if not found:
        raise UserError("there is no question to ask: the sources hold no conversation with an answer")
    return found


def ask(
    lm: LanguageModel,
    questions: Sequence[Question],
    *,
    rows: int = 64,
    max_new_tokens: int = 48,
    blank: bool = True,
    progress: bool | None = None,
) -> tuple[list[Answer], list[Answer] | None]:
    """Greedy answers to all questions, and those of the same model with its pictures and clips blanked.

    Blanked pictures are mean grey and blanked clips are constant, both all zeros; their tokens stay.

    Args:
      rows: questions under way at the same time.
      progress: show a bar; None: where stderr is a terminal.

    Returns:
      Answers in the order of `questions`, and the blanked ones (None without `blank`).

    Raises UserError for a question over the length limit.
    """
    # two sizes: compiling more costs more than padding
    engine = lm.engine(rows, pieces=sorted({max(rows // 4, 1), rows}))
    said: list[Answer | None] = [None] * len(questions)
    blanked: list[Answer | None] | None = [None] * len(questions) if blank else None
    transforms: dict[int, list[Transform]] = {}
    mute: set[int] = set()  # questions without media: blanking changes nothing

    def requests(pool: ThreadPoolExecutor) -> Iterator[Request]:
        for i, example in enumerate(_ahead(pool, lm, questions)):
            transforms[i] = example.transforms
            media = example.num_images + example.num_audio > 0
            if not media:
                mute.add(i)
            yield Request(lm.read(example), max_new_tokens=max_new_tokens, tag=(said, i))
            if blanked is not None and media:
                zeros = {
                    name: np.zeros_like(getattr(example, name)) for name in ("pixel_values", "audio_values")
                }
                request = lm.read(replace(example, **zeros))
                yield Request(request, max_new_tokens=max_new_tokens, tag=(blanked, i))

    total = len(questions) * (2 if blank else 1)
    bar = tqdm(total=total, desc="answers", disable=None if progress is None else not progress)
    with bar, ThreadPoolExecutor(1) as pool:
        for answer in engine.run(requests(pool)):
            found, i = answer.request.tag
            found[i] = _answer(lm, questions[i], answer_ids(answer.tokens, lm.stop_ids), transforms[i])
            bar.update()
            if blanked is not None and found is said and i in mute:
                blanked[i] = said[i]
                bar.update()
    return said, blanked


def to_parts(answers: Sequence[Answer]) -> list[Any]:
    """Answers without their questions, as JSON."""
    return [[answer.ids, to_json(answer.parts), answer.sizes] for answer in answers]


def from_parts(questions: Sequence[Question], value: Sequence[Any]) -> list[Answer]:
    """The answers to `questions` that `to_parts` wrote."""
    found = []
    for question, (ids, parts, sizes) in zip(questions, value, strict=True):
        parts = from_json(tuple[Text | Box, ...], parts)
        found.append(Answer(question, tuple(ids), parts, tuple(tuple(size) for size in sizes)))
    return found


def _ahead(
    pool: ThreadPoolExecutor, lm: LanguageModel, questions: Sequence[Question], ahead: int = 16
) -> Iterator[Example]:
    """The examples of questions; the next ones are read while the model works."""
    waiting: deque = deque()
    for question in questions:
        waiting.append(pool.submit(lm.prompt, question.prompt))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _answer(lm: LanguageModel, question: Question, ids: list[int], transforms: list[Transform]) -> Answer:
    sizes = tuple(transform.original for transform in transforms)
    return Answer(question, tuple(ids), tuple(lm.processor.parts(ids, transforms)), sizes)


def score(answers: Sequence[Answer], blanked: Sequence[Answer] | None) -> dict[str, Any]:
    """`mm_jax.evaluate.metrics.summary` of answers."""
    return summary([a.scored() for a in answers], None if blanked is None else [a.scored() for a in blanked])


def write(
    directory: Path, scores: dict[str, Any], answers: Sequence[Answer], blanked: Sequence[Answer] | None
) -> None:
    """scores.json, scores.md, and answers.jsonl with every question, answer and expectation."""
    lines = []
    for k, answer in enumerate(answers):
        question, scored = answer.question, answer.scored()
        line = {
            "source": question.source,
            "index": question.index,
            "turn": question.turn,
            "id": question.id,
            "task": question.task,
            "question": question.text(),
            "expected": scored.expected,
            "answer": scored.answer,
            "right": is_right(scored),
            "ids": list(answer.ids),
        }
        if scored.expected_box is not None:
            line |= {"expected_box": scored.expected_box}
        if box := _box(answer.parts):
            line |= {"answer_box": box.box, "answer_image": box.image}
        if blanked is not None:
            line["blanked_answer"] = render(blanked[k].parts)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    for name, text in (
        ("scores.json", json.dumps(scores, indent=1) + "\n"),
        ("scores.md", markdown(scores)),
        ("answers.jsonl", "".join(lines)),
    ):
        temporary = directory / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(directory / name)
