"""A training step of the whole model: one program for every kind of batch, one result on any number of devices."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from mm_jax.data.messages import Conversation, Message, Text
from mm_jax.data.packing import BatchConfig, Layout, collate
from mm_jax.errors import UserError
from mm_jax.models import MultimodalLM
from mm_jax.parallel.mesh import data_mesh, put_batch, replicated
from mm_jax.train import losses, partition
from mm_jax.train.config import OptimizerConfig
from mm_jax.train.optimizer import optimizer, schedule
from mm_jax.train.state import TrainState
from mm_jax.train.step import make_step
from tests.tiny import tiny, user

ROWS = BatchConfig(rows=4, length=64, images=3, audio=2)
QUESTIONS = {
    "text": [user("how many"), user("red or blue")],
    "images": [user("what colour is the square", images=(0, 1)), user("red", images=(2,))],
    "audio": [user("which word do you hear", clips=(0,)), user("one or two", clips=(1,))],
    "both": [user("is it in the square", images=(3,), clips=(2,)), user("blue", images=(1, 2))],
}


class Training:
    """The next-token stage of a tiny model, on a mesh."""

    def __init__(self, mesh: Mesh):
        config, params, self.processor = tiny()
        # one layer: most of the time of this file is compilation
        config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=1))
        params["decoder"]["layers"] = jax.tree.map(lambda x: x[:1], params["decoder"]["layers"])
        model = MultimodalLM(config)
        adam = OptimizerConfig(learning_rate=1e-3, warmup_steps=1)
        transform = optimizer(adam, 10)
        trainable, frozen = partition.split(params, (".*_projector", "decoder"))
        self.mesh = mesh
        self.frozen, trainable, opt_state, step, key = jax.device_put(
            (frozen, trainable, transform.init(trainable), np.int32(0), jax.random.key(0)), replicated(mesh)
        )
        self.state = TrainState(step, trainable, opt_state, key)

        def apply(params, batch, method=None):
            return model.apply({"params": params}, batch, method=method)

        self.step = make_step(apply, losses.next_token(("a",)), transform, schedule(adam, 10))

    def batch(self, *rows: str) -> dict:
        """Each row: the two conversations of that name, packed."""
        answer = Message("assistant", (Text("a blue circle"),))
        packed = [
            [self.processor.example(Conversation((q, answer), source="a")) for q in QUESTIONS[name]]
            for name in rows
        ]
        return collate(packed, ROWS, Layout.of(self.processor), {"a": 0})

    def run(self, batch: dict) -> dict[str, float]:
        self.state, metrics = self.step(self.state, self.frozen, put_batch(batch, self.mesh))
        return {name: float(x[0] / x[1]) for name, x in metrics.items()}


def compare() -> None:
    """In a process with four devices: six steps on all of them and on one; prints what happened as JSON.

    The first and the last batch have a row of every kind, those between have rows of one kind.
    """
    everywhere = data_mesh(ROWS.rows)
    alone = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    results: dict = {"compiled": []}
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    for name, mesh in (("four", everywhere), ("one", alone)):
        training, results[name] = Training(mesh), []
        kinds = [tuple(QUESTIONS), *((kind,) * 4 for kind in QUESTIONS), tuple(QUESTIONS)]
        for rows in kinds:
            compiled.clear()
            results[name].append(training.run(training.batch(*rows)))
            results["compiled"].append(len(compiled))
        kernel = training.state.trainable["decoder"]["layers"]["mlp"]["up"]["kernel"]
        whole = [shard.device for shard in kernel.addressable_shards if shard.data.shape == kernel.shape]
        results[name + "_copies"] = len(set(whole))
    spread = put_batch(training.batch(*QUESTIONS), everywhere)
    results["rows"] = [
        {name: len(shard.data) for name, shard in zip(spread, shards, strict=True)}
        for shards in zip(*(x.addressable_shards for x in spread.values()), strict=True)
    ]
    second = put_batch({"tokens": np.zeros((2, 4, 8))}, everywhere, accumulate=2)["tokens"]
    results["accumulated"] = [shard.data.shape for shard in second.addressable_shards]
    try:
        data_mesh(6)
    except UserError as error:
        results["uneven"] = str(error)
    print(json.dumps(results))


@pytest.fixture(scope="module")
def results() -> dict:
    here = Path(__file__)
    program = (
        f"import sys; sys.path.insert(0, {str(here.parent)!r}); from {here.stem} import compare; compare()"
    )
    path = os.pathsep.join([str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_four_devices_equal_one(results):
    four, one = results["four"], results["one"]
    assert [step.keys() for step in four] == [step.keys() for step in one]
    for a, b in zip(four, one, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), name
    assert one[5]["loss"] < one[0]["loss"] - 1e-2  # the same batch after five updates: it does learn


def test_text_pictures_and_sounds_go_through_one_program(results):
    """Compilations anywhere in the process: the first step of a mesh has some, the others have none."""
    first, *others = results["compiled"][:6]
    assert first > 0 and others == [0] * 5
    assert results["compiled"][7:] == [0] * 5
    values = [step["loss"] for step in results["one"]]
    assert np.isfinite(values).all() and len(set(values)) == 6


def test_rows_are_spread_and_parameters_copied(results):
    assert len(results["rows"]) == 4
    assert all(set(device.values()) == {1} for device in results["rows"])
    assert (results["four_copies"], results["one_copies"]) == (4, 1)
    assert results["accumulated"] == [[2, 1, 8]] * 4


def test_rows_that_cannot_be_spread_are_a_clear_mistake(results):
    assert results["uneven"] == "batch.rows is 6, a multiple of the 4 devices is needed"
