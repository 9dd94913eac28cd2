"""`report`: the page about an evaluated run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm_jax.cli.parser import Parser
from mm_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "report",
        "Write report.html of a run that has been evaluated: scores, loss curves, and questions with\n"
        "pictures, boxes and heat maps of where the model looked.",
        "python -m mm_jax report runs/quickstart",
    )
    parser.add_argument("run", help="run directory")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="questions of each task (3)")
    parser.add_argument("--out", metavar="HTML", help="the page (default: report.html in the run directory)")
    options = parser.parse_args(argv)
    if options.samples < 1:
        raise UserError(f"--samples is {options.samples}; at least 1 is needed")

    import json

    from mm_jax.cli.evaluate import held_out  # after --help: this imports jax
    from mm_jax.evaluate.report import read_answers, write_report
    from mm_jax.lm import load_lm
    from mm_jax.train.config import read_config
    from mm_jax.train.setup import enable_compilation_cache

    config = read_config(options.run)
    read_answers(options.run)
    try:
        scores = json.loads((Path(options.run) / "scores.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{options.run}/scores.json cannot be read ({error}); run evaluate again") from None
    sources = held_out(config, scores.get("split", "test"), data=scores.get("data"))
    enable_compilation_cache()
    path = write_report(
        options.run,
        load_lm(options.run, scores.get("stage"), scores.get("weights", "float")),
        sources,
        samples=options.samples,
        out=options.out,
    )
    print(path)
    return 0
