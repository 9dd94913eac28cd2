"""Questions of held-out conversations, asked in batches of fixed shape, with and without the media."""

from __future__ import annotations

import json
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
from mm_jax.inference.batch import collate_prompts, length_bucket
from mm_jax.inference.generate import answer_ids
from mm_jax.inference.text import render

if TYPE_CHECKING:
    from mm_jax.data.example import Example
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
    Questions of the same task are batched together, so that short answers do not wait for captions.

    Args:
      rows: of a batch; the last one of a kind is padded to it.
      progress: show a bar; None: where stderr is a terminal.

    Returns:
      Answers in the order of `questions`, and the blanked ones (None without `blank`).

    Raises UserError for a question over the length limit.
    """

    def kind(i: int) -> tuple:
        parts = [part for message in questions[i].prompt for part in message.parts]
        images = sum(isinstance(part, Image) for part in parts)
        return images, sum(isinstance(part, Audio) for part in parts), questions[i].task, questions[i].source

    order = sorted(range(len(questions)), key=lambda i: (kind(i), i))
    batches: list[list[int]] = []
    for i in order:
        last = batches[-1] if batches else []
        if last and len(last) < rows and kind(last[0])[:2] == kind(i)[:2]:
            last.append(i)
        else:
            batches.append([i])
    said: list[Answer | None] = [None] * len(questions)
    blanked: list[Answer | None] | None = [None] * len(questions) if blank else None
    shapes = _Shapes(lm, rows, max_new_tokens)
    bar = tqdm(total=len(questions), desc="questions", disable=None if progress is None else not progress)
    with bar, ThreadPoolExecutor(1) as pool:
        for index, examples in _ahead(pool, lm, questions, batches):
            batch = shapes.collate(examples)
            answers = shapes.answer(batch, examples)
            for i, ids, example in zip(index, answers, examples, strict=True):
                said[i] = _answer(lm, questions[i], ids, example)
            if blanked is not None:
                if "pixel_values" in batch or "audio_values" in batch:
                    zeros = {
                        k: np.zeros_like(batch[k]) for k in ("pixel_values", "audio_values") if k in batch
                    }
                    answers = shapes.answer(batch | zeros, examples)
                for i, ids, example in zip(index, answers, examples, strict=True):
                    blanked[i] = _answer(lm, questions[i], ids, example)
            bar.update(len(index))
    return said, blanked


def _ahead(
    pool: ThreadPoolExecutor, lm: LanguageModel, questions: Sequence[Question], batches: list[list[int]]
) -> Iterator[tuple[list[int], list[Example]]]:
    """Batches of examples; the next one is read while the model works on this one."""

    def encode(index: list[int]) -> list[Example]:
        return [replace(lm.prompt(questions[i].prompt), source="") for i in index]

    waiting = pool.submit(encode, batches[0]) if batches else None
    for k, index in enumerate(batches):
        examples = waiting.result()
        waiting = pool.submit(encode, batches[k + 1]) if k + 1 < len(batches) else None
        yield index, examples


def _answer(lm: LanguageModel, question: Question, ids: list[int], example: Example) -> Answer:
    sizes = tuple(transform.original for transform in example.transforms)
    return Answer(question, tuple(ids), tuple(lm.processor.parts(ids, example.transforms)), sizes)


class _Shapes:
    """Keeps shapes from changing between batches: what one batch needed the next of its kind gets too."""

    def __init__(self, lm: LanguageModel, rows: int, new_tokens: int):
        self.generator, self.rows, self.new_tokens = lm.generator, rows, new_tokens
        self.lengths: dict[tuple[int, int], int] = {}
        self.cache_length = 0

    def collate(self, examples: list[Example]) -> dict[str, np.ndarray]:
        longest = max(example.length for example in examples)
        self.generator.check_length(longest, self.new_tokens)
        kind = max(e.num_images for e in examples), max(e.num_audio for e in examples)
        self.lengths[kind] = max(self.lengths.get(kind, 0), longest)
        self.cache_length = max(self.cache_length, length_bucket(longest) + self.new_tokens)
        layout = self.generator.layout
        return collate_prompts(examples, layout, rows=self.rows, length=self.lengths[kind])

    def answer(self, batch: dict[str, np.ndarray], examples: list[Example]) -> list[list[int]]:
        generator = self.generator
        output = generator.generate(batch, self.new_tokens, cache_length=self.cache_length)
        return [answer_ids(row, generator.stop_ids) for row in output[: len(examples)]]


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
