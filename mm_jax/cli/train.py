"""`train`: run the stages of a config, or go on where the run directory stands."""

from collections.abc import Sequence
from pathlib import Path

from mm_jax.cli.arguments import TOGETHER, split_arguments, together
from mm_jax.errors import UserError

HELP = """usage: python -m mm_jax train CONFIG.py [--run DIR] [--profile A:B] [--any.field value ...]

Runs the stages of a config. On a directory with a run of the same config it goes on where that run stands.
Ctrl-C or SIGTERM saves and exits.

  --run DIR          run directory (default: runs/<name of the config>)
  --profile A:B      trace the steps A to B of this process, for TensorBoard and Perfetto
  --coordinator HOST:PORT --processes N --process-id I
                     train together with other processes; found out alone on TPU pods, GKE, Slurm and MPI
  --start-timeout S  seconds to wait for the other processes (default: 300)
  --unfinished CODE  exit with this code when stopped before the end (default: 0)
  --fields           list all fields of the config

example: python -m mm_jax train configs/quickstart.py --run runs/quickstart --stages.align.steps 100"""


def main(argv: Sequence[str]) -> int:
    parsed = split_arguments(
        argv, HELP, options=("run", "profile", "unfinished", *TOGETHER), flags=("fields",)
    )
    if parsed is None:
        return 0
    from mm_jax.train.config import load_config  # after --help: this imports jax

    unfinished = parsed.options.get("unfinished", "0")
    if not (unfinished.isdigit() and int(unfinished) < 256):
        raise UserError(f"--unfinished is {unfinished}; a whole number from 0 to 255 is needed")
    config = load_config(parsed.path, ["--help"] if "fields" in parsed.flags else parsed.rest)
    from mm_jax.train.profile import parse_steps

    profile = parse_steps(parsed.options["profile"]) if "profile" in parsed.options else None
    run_dir = Path(parsed.options.get("run", f"runs/{config.name}"))
    with together(parsed.options):
        from mm_jax.cli.data import make_missing
        from mm_jax.parallel import processes
        from mm_jax.train.loop import train

        processes.once_a_host(lambda: make_missing(config))
        done = train(config, run_dir, profile)
    if processes.is_first():
        again = f"stopped and saved; go on with: python -m mm_jax train {' '.join(argv)}"
        print(f"done: {run_dir}" if done else again)
    return 0 if done else int(unfinished)
