"""Writes the configs that are missing, several at a time."""

import contextlib
import multiprocessing
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from mm_jax.data.quickstart.sizes import LARGE, SIZES
from mm_jax.errors import UserError, nearest

NAME = "mm_jax_quickstart"
# Seconds of one core for a thousand records, roughly: the longest config starts first.
_COST = {"charts": 20.0, "scenes": 2.0, "speech": 6.0, "sound_scenes": 7.0, "dialogues": 2.0}


def prepare(names: Iterable[str] = (), data_dir: str | os.PathLike = "", processes: int = 0) -> list[Path]:
    """Directories of the configs `names` ("scenes", ...) under `data_dir`, written where missing.

    `processes` is the number of worker processes (0: one a core). A config counts as there only once all of
    its splits were written and its directory was renamed; what a killed run left is written anew. The calling
    module needs the `if __name__ == "__main__"` guard that `multiprocessing` asks for.

    Raises:
        UserError: a name that the data set does not have.
    """
    from tqdm import tqdm

    names, root = list(dict.fromkeys(names)), Path(data_dir).expanduser().absolute()
    for name in names:
        if name not in SIZES:
            raise UserError(f'{NAME} has no config "{name}"{nearest(name, SIZES)}')
    missing = [name for name in names if not find(name, root)]
    missing.sort(key=_cost, reverse=True)
    total = sum(SIZES[name].train + SIZES[name].validation + SIZES[name].test for name in missing)
    workers = min(len(missing), processes or _cores())
    with tqdm(total=total, desc="data", unit="record", disable=not missing, mininterval=0.5) as bar:
        if workers <= 1:
            for name in missing:
                bar.set_postfix_str(name)
                bar.update(write(name, root))
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, context) as pool:
                try:
                    for future in as_completed([pool.submit(write, name, root) for name in missing]):
                        bar.update(future.result())
                except BaseException:  # Ctrl-C or a full disk: do not start what is still waiting
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return [find(name, root) for name in names]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cost(name: str) -> float:
    return SIZES[name].train * _COST.get(name.removesuffix(LARGE), 1.0)


def find(name: str, root: str | os.PathLike) -> Path | None:
    """The directory of a complete config, e.g. `root/mm_jax_quickstart/scenes/1.1.0`, or None."""
    from mm_jax.data.quickstart.builder import MmJaxQuickstart

    directory = Path(root) / NAME / name / str(MmJaxQuickstart.VERSION)
    # The writer renames a finished directory into place, and writes this file last of all.
    return directory if (directory / "dataset_info.json").is_file() else None


def write(name: str, root: str | os.PathLike) -> int:
    """Writes one config and returns its number of records."""
    import tensorflow_datasets as tfds

    from mm_jax.data.quickstart.builder import MmJaxQuickstart

    tfds.disable_progress_bar()
    builder = MmJaxQuickstart(config=name, data_dir=str(root), file_format="array_record")
    if not find(name, root):
        shutil.rmtree(builder.data_path, ignore_errors=True)  # tfds would take any directory as complete
    try:
        # It prints lines of its own that would tear the progress bar.
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            builder.download_and_prepare()
    except OSError:
        if not find(name, root):  # else another run finished the same config meanwhile
            raise
    return sum(split.num_examples for split in builder.info.splits.values())
