"""`evaluate`: scores of a run on held-out data, beside the same model without its pictures and clips."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_jax.cli.arguments import together
from mm_jax.cli.parser import Parser, add_together, add_weights
from mm_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from mm_jax.data.sources import Source
    from mm_jax.train.config import RunConfig


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "evaluate",
        "Ask a run the questions of a held-out split; writes scores.json, scores.md and answers.jsonl.",
        "python -m mm_jax evaluate runs/quickstart --split test",
    )
    parser.add_argument("run", help="run directory")
    parser.add_argument("--stage", help="use the checkpoint of this stage (default: the newest)")
    parser.add_argument("--split", default="test", help="split of the run's TFDS sources (test)")
    parser.add_argument("--sources", metavar="A,B", help="only these sources of the run (default: all)")
    parser.add_argument(
        "--data", metavar="JSONL", help="ask this chat JSONL file instead of the run's sources"
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="conversations of each source; 0: all (0)"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="ROWS", help="questions at a time (64)")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="longest answer (48)")
    parser.add_argument("--no-blank", action="store_true", help="skip the blanked model")
    parser.add_argument("--out", metavar="DIR", help="where the files go (default: the run directory)")
    add_weights(parser)
    add_together(parser)
    options = parser.parse_args(argv)
    for name in ("limit", "batch", "max_new_tokens"):
        if getattr(options, name) < (name != "limit"):
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; it must not be that small"
            )

    with together({name: value for name, value in vars(options).items() if value is not None}):
        return evaluate(options)


def evaluate(options: argparse.Namespace) -> int:
    """Asks, scores and writes; of several processes each asks its share, with the whole model on its first device."""
    from mm_jax.evaluate import metrics, runner  # after --help: this imports jax
    from mm_jax.lm import load_lm
    from mm_jax.parallel import processes
    from mm_jax.train.config import read_config
    from mm_jax.train.setup import enable_compilation_cache

    config = read_config(options.run)
    sources = held_out(config, options.split, options.sources, options.data)
    enable_compilation_cache()
    lm = load_lm(options.run, options.stage, options.weights)
    questions = runner.read_questions(sources, options.limit)
    count = processes.count()
    mine = questions[processes.index() :: count]
    said = runner.ask(
        lm, mine, rows=options.batch, max_new_tokens=options.max_new_tokens, blank=not options.no_blank
    )
    everyone = processes.gather([found and runner.to_parts(found) for found in said])
    if not processes.is_first():
        return 0
    answers, blanked = (
        None if options.no_blank and k else runner.from_parts(questions, _dealt([one[k] for one in everyone]))
        for k in range(2)
    )
    about = {"run": config.name} | checkpoint_of(options.run, config, options.stage)
    about |= {} if options.weights == "float" else {"weights": options.weights}
    about |= {"data": options.data} if options.data else {"split": options.split}
    scores = about | runner.score(answers, blanked)
    out = Path(options.out or options.run)
    try:
        out.mkdir(parents=True, exist_ok=True)
        runner.write(out, scores, answers, blanked)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None
    print(metrics.markdown(scores), end="")
    return 0


def _dealt(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """[[a, c], [b]] -> [a, b, c]"""
    return [parts[k % len(parts)][k // len(parts)] for k in range(sum(map(len, parts)))]


def checkpoint_of(run: str, config: RunConfig, stage: str | None) -> dict:
    """{"stage", "step"} of the checkpoint that `load_lm` takes."""
    from mm_jax.checkpoint.run import latest

    name, step = latest(run, list(config.stages), stage)
    return {"stage": name, "step": step}


def held_out(
    config: RunConfig, split: str, names: str | None = None, data: str | None = None
) -> dict[str, Source]:
    """The sources of a run at another split, or one chat file. Files have no splits and are left out.

    Raises UserError for an unknown source or split, or when nothing is left.
    """
    from mm_jax.data.sources import SourceConfig, open_source

    if data:
        return {"data": open_source("data", SourceConfig("chat", data))}
    wanted = config.sources
    if names:
        for name in names.split(","):
            if name not in config.sources:
                raise UserError(f'the run has no source "{name}"{nearest(name, config.sources)}')
        wanted = {name: config.sources[name] for name in names.split(",")}
    found = {
        name: open_source(name, dataclasses.replace(source, split=split), config.data_dir)
        for name, source in wanted.items()
        if source.kind == "tfds"
    }
    if not found:
        raise UserError("the run's sources are files, which have no held-out split; name a file with --data")
    return found
