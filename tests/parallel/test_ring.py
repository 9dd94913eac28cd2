"""Rows in parts on several devices: ring and all-to-all attention give what attention over whole rows gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.models import Execution, Mask, attention, row_mask
from mm_jax.models.attention import narrowed
from mm_jax.parallel.hlo import analyse
from mm_jax.parallel.mesh import MeshConfig, make_mesh
from mm_jax.parallel.rules import Rules

RING, HEADS, KERNEL = Execution(), Execution(context="heads"), Execution(attention="splash")
PACKED = [
    [60, 20, 70],
    [160],
    [10, 10, 100, 40],
    [3, 150],
]  # lengths of conversations of each row; padding behind


def segments(length: int) -> np.ndarray:
    rows = [np.repeat(np.arange(1, len(row) + 1), np.asarray(row) * length // 160) for row in PACKED]
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows]).astype(np.int32)


def windowed(length: int, *windows: int) -> Mask:
    return narrowed(row_mask(segments(length)), jnp.int32(windows[-1]), windows, None)


def unsegmented(length: int) -> Mask:
    return Mask(slots=jnp.arange(length)[None], whole=True)


# name -> (mesh, length, query heads, key heads, mask of a length, cap, execution)
CASES = {
    "packed": (dict(context=4, fsdp=2), 160, 4, 2, lambda n: row_mask(segments(n)), 0.0, RING),
    "an odd number of devices and tokens": (dict(context=3), 15 * 3, 2, 1, lambda n: row_mask(segments(n)), 0.0, RING),
    "three devices": (dict(context=3), 48, 2, 1, lambda n: row_mask(segments(n)), 0.0, RING),
    "both ways": (dict(context=8), 160, 2, 2, lambda n: row_mask(segments(n), causal=False), 0.0, RING),
    "no segments": (dict(context=4, data=2), 64, 2, 2, unsegmented, 0.0, RING),
    "a window in a part": (dict(context=4, fsdp=2), 160, 2, 1, lambda n: windowed(n, 7), 5.0, RING),
    "a window over parts": (dict(context=8), 160, 2, 1, lambda n: windowed(n, 90), 0.0, RING),
    "layers with and without": (dict(context=4, fsdp=2), 160, 2, 1, lambda n: windowed(n, 0, 50), 0.0, RING),
    "few key heads": (dict(context=2, tensor=4), 160, 8, 2, lambda n: row_mask(segments(n)), 3.0, RING),
    "heads": (dict(context=4, fsdp=2), 160, 8, 4, lambda n: row_mask(segments(n)), 0.0, HEADS),
    "heads with tensor": (dict(context=2, tensor=2, fsdp=2), 160, 8, 4, lambda n: windowed(n, 30), 0.0, HEADS),
    "fewer heads than parts": (dict(context=4, fsdp=2), 160, 8, 2, lambda n: row_mask(segments(n)), 0.0, HEADS),
    "kernel": (dict(context=2, tensor=2, fsdp=2), 512, 4, 2, lambda n: row_mask(segments(n)), 5.0, KERNEL),
    "kernel with a window": (dict(context=4, fsdp=2), 512, 2, 1, lambda n: windowed(n, 200), 0.0, KERNEL),
}  # fmt: skip


def difference(name: str) -> dict[str, float]:
    """Of the outputs and of each gradient, as a part of the largest; and what goes between devices."""
    sizes, length, heads, kv_heads, mask_of, cap, execution = CASES[name]
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1} | sizes), devices=devices)
    keys, rows = jax.random.split(jax.random.key(0), 3), len(PACKED)
    shapes = [(rows, length, n, 16) for n in (heads, kv_heads, kv_heads)]
    arrays = [2 * jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]
    mask = mask_of(length)

    def total(execution: Execution, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        arrays = [execution.constrain(x, "batch", "length", None, None) for x in arrays]
        out = attention(*arrays, mask, None, cap, execution=execution)
        out = execution.constrain(out, "batch", "length", None, None)
        return jnp.sin(3 * out).sum(), out

    def run(execution: Execution) -> tuple:
        program = jax.jit(jax.value_and_grad(lambda *a: total(execution, *a), (0, 1, 2), has_aux=True))
        (_, out), gradients = program(*arrays)
        return (out, *gradients), program

    found, program = run(
        Execution(mesh, Rules().axes(), attention=execution.attention, context=execution.context)
    )
    plain, _ = run(Execution())
    kinds = analyse(program.lower(*arrays).compile().as_text()).collectives
    worst = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(found, plain, strict=True))
    return {"worst": worst} | {kind: calls for kind, (calls, _) in kinds.items()}


def compare(names: str) -> None:
    print("RESULTS " + json.dumps({name: difference(name) for name in json.loads(names)}))


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    """Of every case, from a process with eight devices."""
    here = Path(__file__)
    program = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as t; t.compare(sys.argv[1])"
    path = os.pathsep.join([str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(list(CASES))],
        capture_output=True, text=True, env=environment, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULTS ")[2])


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_whole_rows(name: str, found: dict) -> None:
    assert found[name]["worst"] < 1e-5, found[name]


def test_keys_go_round_and_are_not_gathered(found: dict) -> None:
    for name, (sizes, *_, execution) in CASES.items():
        if execution.context == "ring":
            assert found[name]["collective-permute"] > 2, (name, found[name])
            # heads that tensor had parted are gathered at the end, and no tokens
            assert "all-gather" not in found[name] or "tensor" in sizes, (name, found[name])
    assert "all-to-all" in found["heads"] and "collective-permute" not in found["heads"]
    # a window ends the round: one part back, and home
    assert (
        found["a window in a part"]["collective-permute"] < found["a window over parts"]["collective-permute"]
    )
