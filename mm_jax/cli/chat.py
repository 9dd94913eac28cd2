"""`chat`: talk with a model, several turns, answers appear word by word."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mm_jax.cli.parser import Parser, add_sampling, add_weights
from mm_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from mm_jax.data.messages import Part
    from mm_jax.inference.sampling import Sampling
    from mm_jax.lm import LanguageModel

HELP = """/image PATH   put a picture before the next question
/audio PATH   put a clip before the next question
/reset        forget the conversation
/help         this list
Ctrl-C stops an answer, Ctrl-D leaves."""
COMMANDS = ("/image", "/audio", "/reset", "/help")


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "chat",
        "Talk with the model of a run. Without a terminal, questions are lines of standard input.\n\n"
        "in the chat:\n" + HELP,
        "python -m mm_jax chat runs/quickstart --image my.png --audio word.wav",
    )
    parser.add_argument("run", help="run directory")
    parser.add_argument("--stage", help="use the checkpoint of this stage (default: the newest)")
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="picture for the first question"
    )
    parser.add_argument(
        "--audio", action="append", default=[], metavar="PATH", help="clip for the first question"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="ask this and leave; repeat it"
    )
    parser.add_argument("--draw", metavar="PNG", help="draw the boxes of an answer into its picture")
    add_sampling(parser)
    add_weights(parser)
    options = parser.parse_args(argv)

    from mm_jax.inference.sampling import Sampling  # after --help: this imports jax
    from mm_jax.lm import load_lm

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    lm = load_lm(options.run, options.stage, options.weights)
    chat = Chat(lm, sampling, options.max_new_tokens, options.draw)
    for path in options.image:
        chat.attach("/image", path)
    for path in options.audio:
        chat.attach("/audio", path)
    if options.prompt:
        for prompt in options.prompt:
            chat.ask(prompt)
        return 0
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{options.run}. {HELP}")
    failed = False
    for line in _lines(terminal):
        try:
            chat.line(line)
        except UserError as error:
            failed = True
            print(f"mm_jax chat: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", flush=True)
    return 2 if failed and not terminal else 0


def _lines(terminal: bool) -> Iterator[str]:
    """Questions until the end of the input; Ctrl-C at the prompt drops the line."""
    if not terminal:
        yield from sys.stdin
        return
    try:
        import readline  # noqa: F401  # line editing and history for input()
    except ImportError:
        pass  # not on Windows
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


class Chat:
    """The state of the command: the conversation and what waits for the next question."""

    def __init__(self, lm: LanguageModel, sampling: Sampling, max_new_tokens: int, draw: str | None):
        self._lm, self._session = lm, lm.session()
        self._sampling, self._max_new_tokens, self._draw = sampling, max_new_tokens, draw
        self._waiting: list[Part] = []

    def line(self, line: str) -> None:
        """One line of input: a command, a question, or nothing."""
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self.ask(line)
            return
        command, _, rest = line.partition(" ")
        if command in ("/image", "/audio"):
            self.attach(command, rest.strip())
        elif command == "/reset":
            self._session.reset()
            self._waiting = []
        elif command == "/help":
            print(HELP)
        else:
            raise UserError(f'unknown command "{command}"{nearest(command, COMMANDS)}')

    def attach(self, command: str, path: str) -> None:
        """Keep a picture or clip for the next question, after checking that it can be used."""
        from mm_jax.data.messages import Audio, Image

        if not path:
            raise UserError(f"{command} needs a path")
        if command == "/image":
            self._lm.preprocess(images=[path])
            self._waiting.append(Image(path))
        else:
            self._lm.preprocess(audio=[path])
            self._waiting.append(Audio(path))

    def ask(self, question: str) -> None:
        """Print the answer as it is made."""
        from mm_jax.data.messages import Text

        if not question.strip():
            raise UserError("the question is empty")
        parts = (*self._waiting, Text(question.strip()))
        pieces = self._session.stream(parts, max_new_tokens=self._max_new_tokens, sampling=self._sampling)
        before = len(self._session.messages)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:
            pieces.close()  # what was said so far stays in the conversation
            if len(self._session.messages) > before:
                self._waiting = []
        print(flush=True)
        if self._draw:
            self._draw_boxes()

    def _draw_boxes(self) -> None:
        from mm_jax.data.media import decode_image
        from mm_jax.data.messages import Box, Image
        from mm_jax.evaluate.draw import ANSWER, draw_boxes

        boxes = [part for part in self._session.messages[-1].parts if isinstance(part, Box)]
        images = [
            part for message in self._session.messages for part in message.parts if isinstance(part, Image)
        ]
        for k in sorted({box.image for box in boxes if box.image < len(images)}):
            mine = [(box.box, ANSWER) for box in boxes if box.image == k]
            try:
                draw_boxes(decode_image(images[k].source), mine).save(self._draw)
            except (OSError, ValueError) as error:
                raise UserError(f"cannot write {self._draw}: {error}") from None
            print(f"({self._draw})", flush=True)
