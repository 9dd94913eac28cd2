"""Argument parsing of the commands that read a run: mistakes become one line."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from mm_jax.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError, offering the nearest option for a misspelt one."""

    def __init__(self, command: str, description: str, example: str):
        super().__init__(
            prog=f"python -m mm_jax {command}",
            description=description,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            options = [name for action in self._actions for name in action.option_strings]
            name = found[1].partition("=")[0]
            hint = nearest(name, options) if name.startswith("-") else ""
            message = f'unknown argument "{found[1]}"{hint}'
        raise UserError(message)


def add_together(parser: argparse.ArgumentParser) -> None:
    """The options of `mm_jax.cli.arguments.TOGETHER`."""
    group = parser.add_argument_group("many processes", "Found out alone on TPU pods, GKE, Slurm and MPI.")
    for name, value, text in (
        ("coordinator", "HOST:PORT", "where process 0 is"),
        ("processes", "N", "how many there are"),
        ("process-id", "I", "which of them this is"),
        ("start-timeout", "S", "seconds to wait for the others (300)"),
    ):
        group.add_argument(f"--{name}", dest=name, metavar=value, help=text)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """How the decoder's weights lie in memory."""
    parser.add_argument(
        "--weights", default="float", metavar="KIND",
        help="float, or the decoder's kernels as int8 or int4: less memory, a little less exact (float)",
    )  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of `Sampling` and the length of answers."""
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest answer (64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample among the k likeliest tokens; 0: all (0)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample among tokens up to this probability (1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
