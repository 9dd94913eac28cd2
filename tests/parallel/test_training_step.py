"""A training step of the whole model: one program for every kind of batch, one result on any mesh."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from mm_jax.data.messages import Conversation, Message, Text
from mm_jax.data.packing import BatchConfig, Layout, collate
from mm_jax.errors import UserError
from mm_jax.models import Execution, MultimodalLM
from mm_jax.parallel.mesh import MeshConfig, make_mesh
from mm_jax.parallel.rules import Rules, place_tree, put_batch, replicated
from mm_jax.train import losses, partition
from mm_jax.train.state import TrainState
from mm_jax.train.step import make_step
from tests.tiny import random_params, tiny, user

ROWS = BatchConfig(rows=8, length=64, images=3, audio=2)
QUESTIONS = {
    "text": [user("how many"), user("red or blue")],
    "images": [user("what colour is the square", images=(0, 1)), user("red", images=(2,))],
    "audio": [user("which word do you hear", clips=(0,)), user("one or two", clips=(1,))],
    "both": [user("is it in the square", images=(3,), clips=(2,)), user("blue", images=(1, 2))],
}
MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(tensor=2, data=4),
    "mixed": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
}
RULES = {
    "mixed": Rules(tower_heads=("tensor",), tower_mlp=("tensor",)),
    # the towers' own rule may differ from the decoder's
    "tensor": Rules(tower_embed=()),
}


class Training:
    """The next-token loss of a tiny model on a mesh; every step begins with the same parameters, and the update is the
    gradient."""

    def __init__(self, name: str, remat: str = "none"):
        config, _, self.processor = tiny()
        # one layer: most of the time of this file is compilation
        decoder = dataclasses.replace(config.decoder, num_layers=1, vocab_size=400)
        config = dataclasses.replace(config, decoder=decoder)
        params = random_params(config, 0)
        self.rules = RULES.get(name, Rules())
        devices = jax.devices()
        self.mesh = make_mesh(MESHES[name]) if name in MESHES else make_mesh(devices=devices[:1])
        model = MultimodalLM(config, Execution(self.mesh, self.rules.axes(), remat))
        transform = optax.sgd(1.0)
        trainable, frozen = partition.split(params, (".*_projector", "decoder"))
        state = TrainState(np.int32(0), trainable, transform.init(trainable), jax.random.key(0))
        shardings = place_tree((state, frozen), params, self.mesh, self.rules)
        self.start, self.shardings = state, shardings[0]
        self.frozen = jax.device_put(frozen, shardings[1])

        def apply(params, batch, method=None):
            return model.apply({"params": params}, batch, method=method)

        def rates(step):
            return 1.0

        loss = losses.next_token(("a",))
        self.step = make_step(apply, loss, transform, rates, shardings=shardings[0])

    def batch(self, *rows: str) -> dict:
        """Each row: the two conversations of that name, packed."""
        answer = Message("assistant", (Text("a blue circle"),))
        packed = [
            [self.processor.example(Conversation((q, answer), source="a")) for q in QUESTIONS[name]]
            for name in rows
        ]
        return collate(packed, ROWS, Layout.of(self.processor), {"a": 0})

    def run(self, *rows: str) -> dict[str, float]:
        arrays = put_batch(self.batch(*rows), self.mesh, self.rules)
        # a copy: the step gives its state up
        state = jax.device_put(jax.device_get(self.start), self.shardings)
        self.state, metrics = self.step(state, self.frozen, arrays)
        return {name: float(x[0] / x[1]) for name, x in metrics.items()}


def compare(directory: str) -> None:
    """In a process with eight devices: steps on every mesh; what happened as JSON, the parameters beside it.

    The first batch has rows of every kind, the others rows of one kind.
    """
    results: dict = {"compiled": {}, "metrics": {}}
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    for name in ("one", *MESHES):
        training, results["metrics"][name], results["compiled"][name] = Training(name), [], []
        kinds = [tuple(QUESTIONS) * 2, *((kind,) * 8 for kind in QUESTIONS)]
        for k, rows in enumerate(kinds if name in ("one", "mixed") else kinds[:1]):
            compiled.clear()
            results["metrics"][name].append(training.run(*rows))
            results["compiled"][name].append(len(compiled))
            if k == 0:
                flat = flatten_dict(jax.device_get(training.state.trainable), sep="/")
                np.savez(f"{directory}/{name}.npz", **flat)
        results[name + "_shards"] = {
            path: [list(array.shape), list(array.addressable_shards[0].data.shape)]
            for path, array in flatten_dict(training.state.trainable | training.frozen, sep="/").items()
        }
    mesh = make_mesh(MeshConfig(fsdp=8))
    spread = put_batch(training.batch(*tuple(QUESTIONS) * 2), mesh)
    results["rows"] = [
        {name: len(shard.data) for name, shard in zip(spread, shards, strict=True)}
        for shards in zip(*(x.addressable_shards for x in spread.values()), strict=True)
    ]
    second = put_batch({"tokens": np.zeros((2, 8, 8))}, mesh, accumulate=2)["tokens"]
    results["accumulated"] = [shard.data.shape for shard in second.addressable_shards]
    try:
        put_batch({"tokens": np.zeros((6, 8))}, mesh)
    except UserError as error:
        results["uneven"] = str(error)
    hybrid = make_mesh(MeshConfig(dcn_data=2))
    results["hybrid"] = dict(hybrid.shape)
    assert replicated(hybrid).is_fully_replicated
    Path(directory, "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    here, directory = Path(__file__), tmp_path_factory.mktemp("meshes")
    program = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as t; t.compare(sys.argv[1])"
    path = os.pathsep.join([str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=2400,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((directory / "results.json").read_text())
    return found | {"params": {name: dict(np.load(directory / f"{name}.npz")) for name in ("one", *MESHES)}}


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_equals_one_device(results, name):
    """Loss, metrics and every gradient."""
    for ours, one in zip(results["metrics"][name], results["metrics"]["one"], strict=False):
        assert ours.keys() == one.keys()
        for key in ours:
            assert ours[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), key
    for path, expected in results["params"]["one"].items():
        np.testing.assert_allclose(results["params"][name][path], expected, atol=1e-5, err_msg=path)


def test_text_pictures_and_sounds_go_through_one_program(results):
    """Compilations anywhere in the process: the first step of a mesh has some, the others have none."""
    for name in ("one", "mixed"):
        first, *others = results["compiled"][name]
        assert first > 0 and others == [0] * 4
    values = [step["loss"] for step in results["metrics"]["one"]]
    assert np.isfinite(values).all() and len(set(values)) == 5


def test_parameters_are_in_pieces(results):
    """[whole, piece of one device] of a matrix, by mesh."""
    up, table = "decoder/layers/mlp/up/kernel", "decoder/embedding/embedding"
    tower = "vision/layers/mlp/up/kernel"
    pieces = {name: results[name + "_shards"] for name in ("one", *MESHES)}
    assert pieces["one"][up] == [[1, 32, 48], [1, 32, 48]]
    assert pieces["fsdp"][up][1] == [1, 4, 48] and pieces["fsdp"][tower][1] == [1, 3, 32]
    assert pieces["tensor"][up][1] == [1, 32, 24] and pieces["tensor"][tower][1] == [1, 24, 32]
    assert pieces["mixed"][up][1] == [1, 8, 24] and pieces["mixed"][tower][1] == [1, 6, 16]
    assert pieces["mixed"][table] == [[400, 32], [200, 8]]
    for found in pieces["fsdp"].values():  # nothing of the size of a matrix is whole
        assert found[0] != found[1] or np.prod(found[0]) <= 400


def test_rows_are_spread(results):
    assert len(results["rows"]) == 8
    assert all(set(device.values()) == {1} for device in results["rows"])
    assert results["accumulated"] == [[2, 1, 8]] * 8
    assert results["hybrid"] == {"dcn_data": 2, "data": 4, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}


def test_rows_that_cannot_be_spread_are_a_clear_mistake(results):
    assert results["uneven"] == (
        "batch array tokens [6, 8]: batch 6 cannot be split over fsdp 8; choose a mesh whose fsdp divides 6, or leave "
        "batch whole with an empty rules.batch"
    )
