"""`generate`: answers to one question or to a file of conversations, as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_jax.cli.parser import Parser, add_sampling, add_weights
from mm_jax.errors import UserError

if TYPE_CHECKING:
    from mm_jax.data.example import Example
    from mm_jax.data.messages import Message
    from mm_jax.inference.sampling import Sampling
    from mm_jax.lm import LanguageModel


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "generate",
        "Answer one question (--prompt, with --image and --audio) or the conversations of a chat JSONL file\n"
        "(--data). Writes one JSON object a line: id, text, boxes in original pixels. A conversation that\n"
        "already ends with an answer is answered anew.",
        'python -m mm_jax generate runs/quickstart --image my.png --prompt "which colour is the circle?"',
    )
    parser.add_argument("run", help="run directory")
    parser.add_argument("--stage", help="use the checkpoint of this stage (default: the newest)")
    parser.add_argument("--prompt", help="a question")
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="picture of the question"
    )
    parser.add_argument("--audio", action="append", default=[], metavar="PATH", help="clip of the question")
    parser.add_argument("--data", metavar="JSONL", help="a file of conversations in the chat format")
    parser.add_argument("--out", metavar="JSONL", help="where answers go (default: standard output)")
    parser.add_argument(
        "--attention", metavar="DIR",
        help="also tell where the model looked for each word; heat maps over the pictures go into this folder",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=32, metavar="ROWS", help="conversations at a time (32)")
    add_sampling(parser)
    add_weights(parser)
    options = parser.parse_args(argv)
    if (options.prompt is None) == (options.data is None):
        raise UserError("give either --prompt or --data")
    if options.data and (options.image or options.audio):
        raise UserError("--image and --audio go with --prompt; in --data the media stand in the file")
    if options.batch < 1:
        raise UserError(f"--batch is {options.batch}; at least 1 is needed")

    from mm_jax.inference.sampling import Sampling  # after --help: this imports jax
    from mm_jax.lm import load_lm, user_message

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    if options.data:
        prompts = read_prompts(options.data)
    else:
        if not options.prompt.strip():
            raise UserError("the question is empty")
        prompts = [("", (user_message(options.prompt, options.image, options.audio),))]
    lm = load_lm(options.run, options.stage, options.weights)
    try:
        out = open(options.out, "w", encoding="utf-8") if options.out else sys.stdout
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror}") from None
    folder = Path(options.attention) if options.attention else None
    failures = write_answers(lm, prompts, sampling, options.max_new_tokens, options.batch, out, folder)
    if options.out:
        out.close()
    if failures and options.prompt is not None:
        raise UserError(failures[0])
    for failure in failures:
        print(f"mm_jax generate: {failure}", file=sys.stderr)
    return 2 if failures else 0


def read_prompts(path: str) -> list[tuple[str, tuple[Message, ...]]]:
    """(id, messages up to the question) of every line. Raises UserError naming the line."""
    from mm_jax.data.sources import SourceConfig, open_source

    source = open_source("data", SourceConfig("chat", path))
    prompts = []
    for index in range(len(source)):
        conversation = source[index]
        messages = conversation.messages
        if messages[-1].role == "assistant":
            messages = messages[:-1]
        prompts.append((conversation.id or str(index), messages))
    return prompts


def write_answers(
    lm: LanguageModel,
    prompts: Sequence[tuple[str, tuple[Message, ...]]],
    sampling: Sampling,
    max_new_tokens: int,
    rows: int,
    out: Any,
    attention: Path | None = None,
) -> list[str]:
    """One JSON line a prompt, in order; an unusable prompt gets {"id", "error"}. Returns the errors.

    attention: folder for heat maps; without one nothing is said about where the model looked.
    """
    from tqdm import tqdm

    from mm_jax.data.messages import Box
    from mm_jax.inference.request import Request
    from mm_jax.inference.text import answer_ids, render

    engine = lm.engine(rows)
    failures: list[str] = []
    lines: dict[int, dict] = {}
    examples: dict[int, Any] = {}

    def requests() -> Iterator[Request]:
        for k, (name, messages) in enumerate(prompts):
            try:
                example = lm.prompt(messages)
                engine.check_length(example.length, max_new_tokens)
            except UserError as error:
                lines[k] = {"id": name, "error": str(error)}
                failures.append(f'"{name}": {error}' if name else str(error))
                continue
            examples[k] = example
            yield Request(lm.read(example), sampling, max_new_tokens, tag=k)

    written = 0

    def write() -> None:
        """What is ready and has nothing unready before it."""
        nonlocal written
        while written in lines:
            line = {key: value for key, value in lines.pop(written).items() if key != "id" or value}
            if "error" not in line or len(prompts) > 1:
                print(json.dumps(line, ensure_ascii=False), file=out, flush=True)
            written += 1
            bar.update()

    with tqdm(total=len(prompts), desc="answers", disable=None if len(prompts) > 1 else True) as bar:
        for answer in engine.run(requests()):
            k = answer.request.tag
            example, ids = examples.pop(k), answer_ids(answer.tokens, lm.stop_ids)
            parts = lm.processor.parts(ids, example.transforms)
            lines[k] = {"id": prompts[k][0], "text": render(parts)}
            if boxes := [{"box": list(p.box), "image": p.image} for p in parts if isinstance(p, Box)]:
                lines[k]["boxes"] = boxes
            if attention is not None:
                try:
                    found = write_heat(lm, prompts[k][1], example, ids, attention, prompts[k][0] or "answer")
                    lines[k]["attention"] = {"words": found}
                except UserError as error:
                    lines[k]["attention"] = {"error": str(error)}
                    failures.append(str(error))
            write()
        write()
    return failures


def write_heat(
    lm: LanguageModel,
    messages: Sequence[Message],
    example: Example,
    ids: Sequence[int],
    folder: Path,
    name: str,
) -> list[dict]:
    """Heat maps of all words of an answer as NAME-WORD-PICTURE.png; returns the weights and the files."""
    from mm_jax.data.media import decode_image
    from mm_jax.data.messages import Image
    from mm_jax.inference.attention import Look, heat_picture, words_json, words_of

    sources = [part.source for message in messages for part in message.parts if isinstance(part, Image)]
    pictures = [decode_image(source) for source in sources]
    stem = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)

    def draw(word: int, look: Look) -> str:
        path = folder / f"{stem}-{word}-{look.image}.png"
        heat_picture(pictures[look.image], look).save(path)
        return str(path)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        words = words_of(lm.processor, ids, example.transforms)
        return words_json(lm, example, ids, words, range(len(words)), draw)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
