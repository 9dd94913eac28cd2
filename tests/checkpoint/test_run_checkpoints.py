"""Run checkpoints: what is kept, what a damaged or foreign one says, a full disk."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mm_jax.checkpoint.run import StageCheckpoints, latest, load_params, stage_dir
from mm_jax.errors import UserError


def state(value: float, width: int = 4) -> tuple[dict, tuple]:
    params = {"decoder": {"kernel": jnp.full((3, width), value), "bias": jnp.zeros(width)}}
    return params, optax.adamw(1e-3).init(params)


def abstract(tree: object) -> object:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def save(checkpoints: StageCheckpoints, step: int, loss: float) -> None:
    params, opt_state = state(float(step))
    checkpoints.save(step, params, opt_state, {"next_index": step}, {"step": step, "key": [1, 2]}, loss)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"stages": {"align": {}, "instruct": {}}}')
    return tmp_path


def test_everything_comes_back(run_dir: Path) -> None:
    checkpoints = StageCheckpoints(run_dir, "align")
    save(checkpoints, 5, 1.0)
    checkpoints.close()
    params, opt_state = state(5.0)
    saved = StageCheckpoints(run_dir, "align").restore(5, abstract(params), abstract(opt_state))
    jax.tree.map(np.testing.assert_array_equal, saved.params, params)
    jax.tree.map(np.testing.assert_array_equal, saved.opt_state, opt_state)
    assert saved.data == {"next_index": 5}
    assert saved.meta == {"step": 5, "key": [1, 2]}
    jax.tree.map(np.testing.assert_array_equal, load_params(run_dir), params)


def test_the_last_ones_and_the_best_are_kept(run_dir: Path) -> None:
    checkpoints = StageCheckpoints(run_dir, "align", keep_last=2, keep_best=1)
    for step, loss in enumerate((5.0, 1.0, 4.0, 3.0, 2.0), start=1):
        save(checkpoints, step, loss)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints.close()


def test_latest_looks_at_the_last_stage_first_and_past_half_written_ones(run_dir: Path) -> None:
    stages = ["align", "instruct"]
    assert latest(run_dir, stages) is None
    with pytest.raises(UserError, match="holds no finished checkpoint yet"):
        load_params(run_dir)
    checkpoints = StageCheckpoints(run_dir, "align")
    save(checkpoints, 3, 1.0)
    checkpoints.close()
    half = stage_dir(run_dir, "instruct") / "9.orbax-checkpoint-tmp" / "params"
    half.mkdir(parents=True)
    assert latest(run_dir, stages) == ("align", 3)
    checkpoints = StageCheckpoints(run_dir, "instruct")
    save(checkpoints, 9, 1.0)
    checkpoints.close()
    assert latest(run_dir, stages) == ("instruct", 9)
    assert not half.exists()  # tidied up


def test_a_checkpoint_of_another_model_names_the_parameter(run_dir: Path) -> None:
    checkpoints = StageCheckpoints(run_dir, "align")
    save(checkpoints, 1, 1.0)
    checkpoints.wait()
    params, opt_state = state(0.0, width=7)
    with pytest.raises(
        UserError, match=r"another model: decoder/bias is \(4,\) there and \(7,\) in this config"
    ):
        checkpoints.restore(1, abstract(params), abstract(opt_state))
    checkpoints.close()


def test_a_damaged_checkpoint_is_one_clear_error(run_dir: Path) -> None:
    checkpoints = StageCheckpoints(run_dir, "align")
    save(checkpoints, 1, 1.0)
    checkpoints.close()
    params = stage_dir(run_dir, "align") / "1" / "params"
    shutil.rmtree(params / "d")
    for part in params.glob("ocdbt.process_*"):
        shutil.rmtree(part)
    with pytest.raises(UserError, match="cannot read the checkpoint .*/align/1"):
        load_params(run_dir)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes past `size` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_clear_error_and_earlier_checkpoints_stay(run_dir: Path) -> None:
    checkpoints = StageCheckpoints(run_dir, "align")
    save(checkpoints, 1, 1.0)
    checkpoints.wait()
    noise = {"decoder": {"kernel": jax.random.normal(jax.random.key(0), (512, 512))}}
    with file_size_limit(100_000), pytest.raises(UserError) as caught:
        checkpoints.save(2, noise, {"count": jnp.ones(3)}, {}, {}, 1.0)
        checkpoints.wait()
    message = str(caught.value)
    assert message.count("\n") == 0
    assert 'cannot save step 2 of stage "align"' in message
    assert "intact: steps [1]" in message
    checkpoints.close()
    assert latest(run_dir, ["align"]) == ("align", 1)
    np.testing.assert_array_equal(load_params(run_dir)["decoder"]["kernel"], np.ones((3, 4)))
