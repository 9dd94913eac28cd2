"""Checkpoints of a run: one Orbax manager a stage, `checkpoints/<stage>/<step>`.

A checkpoint has four items that can be read apart: `params` (the whole model), `opt_state` (of the trainable
part), `data` (state of the input pipeline, JSON) and `meta` (stage, step, random key, config, JSON). Orbax
writes into a temporary directory and renames it, so a half-written checkpoint is never seen as one.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as oc
from flax.traverse_util import flatten_dict
from orbax.checkpoint import checkpoint_managers as policies

from mm_jax.errors import UserError, nearest

# Orbax logs a failed save with its traceback from the background before we can raise it as one line.
logging.getLogger("absl").addFilter(lambda record: "run() raised an exception" not in record.getMessage())


@dataclass(frozen=True)
class Saved:
    """One checkpoint read back; the trees have the structure that was asked for."""

    params: dict[str, Any]
    opt_state: Any
    data: dict[str, Any]
    meta: dict[str, Any]


class StageCheckpoints:
    """Asynchronous saving and restoring of one stage; keeps the last few and the best.

    Args:
      run_dir: the run directory.
      stage: name of the stage.
      keep_last, keep_best: how many of the newest and of those with the lowest "loss" to keep.
    """

    def __init__(self, run_dir: Path, stage: str, keep_last: int = 2, keep_best: int = 1):
        self.stage = stage
        self.path = stage_dir(run_dir, stage)
        policy = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep_last),
                policies.BestN(
                    get_metric_fn=lambda m: m["loss"],
                    reverse=True,  # the last of the descending order is kept
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = oc.CheckpointManagerOptions(
            preservation_policy=policy,
            enable_async_checkpointing=True,
            create=True,
            cleanup_tmp_directories=True,
        )
        with self._saving("its directory"):
            self._manager = oc.CheckpointManager(self.path.absolute(), options=options)
        self._pending = ""

    def steps(self) -> list[int]:
        """Finished checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, params: Any, opt_state: Any, data: Any, meta: Any, loss: float) -> None:
        """Starts saving; returns as soon as the values are copied, so that the arrays may be donated.

        Raises:
            UserError: this or the save before failed, such as by a full disk; earlier checkpoints stay.
        """
        items = oc.args.Composite(
            params=oc.args.StandardSave(params),
            opt_state=oc.args.StandardSave(opt_state),
            data=oc.args.JsonSave(data),
            meta=oc.args.JsonSave(meta),
        )
        self.wait()
        self._pending = f"step {step}"
        with self._saving(self._pending):
            self._manager.save(step, args=items, metrics={"loss": float(loss)}, force=True)

    def check(self) -> None:
        """Raises UserError when a save in the background has failed; does not wait."""
        with self._saving(self._pending):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until what was saved is on disk; raises UserError when that failed."""
        with self._saving(self._pending):
            self._manager.wait_until_finished()

    def restore(self, step: int, params: Any, opt_state: Any) -> Saved:
        """Reads a checkpoint into trees like the abstract `params` and `opt_state` (with shardings).

        Raises:
            UserError: the checkpoint is of another model (the first differing parameter is named) or damaged.
        """
        path = self.path / str(step)
        _check_same_tree(params, _stored_tree(path), path)
        items = oc.args.Composite(
            params=oc.args.StandardRestore(params),
            opt_state=oc.args.StandardRestore(opt_state),
            data=oc.args.JsonRestore(),
            meta=oc.args.JsonRestore(),
        )
        with _reading(path):
            found = self._manager.restore(step, args=items)
        return Saved(found.params, found.opt_state, found.data, found.meta)

    def close(self) -> None:
        """Waits for the background and frees it; a failed save has been reported by `wait`."""
        try:
            self._manager.close()
        except Exception:  # noqa: BLE001  # the reason was raised by save, check or wait
            pass

    @contextmanager
    def _saving(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            kept = _finished_steps(self.path)
            earlier = f"intact: steps {kept}" if kept else "there is no earlier checkpoint of this stage"
            raise UserError(
                f'cannot save {what} of stage "{self.stage}" in {self.path} ({_reason(error)}); {earlier}'
            ) from error


def stage_dir(run_dir: str | Path, stage: str) -> Path:
    """Where the checkpoints of a stage are."""
    return Path(run_dir) / "checkpoints" / stage


def latest(run_dir: str | Path, stages: list[str], stage: str | None = None) -> tuple[str, int] | None:
    """(stage, step) of the newest finished checkpoint, of `stage` or of the last of `stages` that has one."""
    for name in [stage] if stage else reversed(stages):
        steps = _finished_steps(stage_dir(run_dir, name))
        if steps:
            return name, steps[-1]
    return None


def load_params(
    run_dir: str | Path,
    stage: str | None = None,
    place: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> dict[str, Any]:
    """The params of the newest checkpoint (of `stage`), on the first local device.

    Args:
      place: (path, shape) of a parameter -> where it goes instead.

    Raises:
        UserError: no such stage or no finished checkpoint.
    """
    stages = _stage_names(Path(run_dir))
    if stage is not None and stage not in stages:
        raise UserError(f'"{run_dir}" has no stage "{stage}"{nearest(stage, stages)}')
    found = latest(run_dir, stages, stage)
    if found is None:
        where = f' of stage "{stage}"' if stage else ""
        raise UserError(f'"{run_dir}" holds no finished checkpoint{where} yet')
    path = stage_dir(run_dir, found[0]) / str(found[1])
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def wanted(key: Any, x: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(key, simple=True, separator="/")
        where = place(name, tuple(x.shape)) if place else sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    abstract = jax.tree_util.tree_map_with_path(wanted, _stored_tree(path))
    with _reading(path):
        # The handler, not a Checkpointer: that would warn of the items which are not asked for.
        reader = oc.StandardCheckpointHandler()
        return reader.restore((path / "params").absolute(), args=oc.args.StandardRestore(abstract))


def _stage_names(run_dir: Path) -> list[str]:
    try:
        return list(json.loads((run_dir / "config.json").read_text())["stages"])
    except FileNotFoundError:
        raise UserError(f'"{run_dir}" is not a run directory (no config.json in it)') from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir / 'config.json'} is damaged: {error}") from None


def _finished_steps(path: Path) -> list[int]:
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit() and (p / "params").is_dir())


def _stored_tree(path: Path) -> dict[str, Any]:
    """{name: ...: array metadata} of the saved params."""
    with _reading(path):
        found = oc.StandardCheckpointHandler().metadata((path / "params").absolute())
        return getattr(found, "tree", found)


def _check_same_tree(wanted: Any, stored: Any, path: Path) -> None:
    ours, theirs = flatten_dict(wanted, sep="/"), flatten_dict(stored, sep="/")
    for name in sorted(ours | theirs):
        here = tuple(ours[name].shape) if name in ours else "absent"
        there = tuple(theirs[name].shape) if name in theirs else "absent"
        if here != there:
            raise UserError(f"{path} is of another model: {name} is {there} there and {here} in this config")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot read the checkpoint {path} ({_reason(error)}); "
            "delete that directory to go on from the one before"
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost cause in one line; a full disk in plain words."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if any(sign in text for sign in ("ENOSPC", "No space left", "Errno 28")):
        return "no space left on the disk"
    if any(sign in text for sign in ("EFBIG", "File too large", "Errno 27")):
        return "the file would exceed the size limit of this process"
    return text[:300]
