"""`python -m mm_jax <command>`: imports that command's module only, prints mistakes in one line."""

import importlib
import sys
from collections.abc import Sequence

from mm_jax.errors import UserError, nearest

COMMANDS = {
    "train": "train or go on with a run",
    "compile": "say what the programs of a config need, on TPUs that are not there",
    "data": "prepare or look at the data of a config",
    "evaluate": "score a run on held-out data",
    "report": "write the report page of a run",
    "bench": "time a training step, beside torch where it is installed",
    "chat": "talk with a model about pictures and sounds",
    "generate": "answer one prompt",
    "inspect": "what a checkpoint is made of and what it needs",
    "convert": "rewrite a Hugging Face checkpoint: dtype, names, files",
    "serve": "answer over HTTP, with a page to chat on",
}

USAGE = """usage: python -m mm_jax COMMAND ...

{commands}

example: python -m mm_jax train configs/quickstart.py --run runs/quickstart
`python -m mm_jax COMMAND --help` says more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; exit codes: 0 done (or stopped and saved), 2 a mistake of the user, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
        print(USAGE.format(commands=lines))
        return 0 if argv else 2
    name, *rest = argv
    try:
        if name not in COMMANDS:
            raise UserError(f'unknown command "{name}"{nearest(name, COMMANDS)}')
        return importlib.import_module(f"mm_jax.cli.{name}").main(rest) or 0
    except UserError as error:
        print(f"mm_jax {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1  # the reader of a pipe has enough


if __name__ == "__main__":
    sys.exit(main())
