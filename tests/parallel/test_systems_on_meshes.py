"""Loss and gradients of three kinds of model with packed rows: eight devices give what one gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mm_jax.data.example import Example
from mm_jax.data.packing import BatchConfig, Layout, collate
from mm_jax.data.patches import Medium, PatchLayout, positions, slots
from mm_jax.models import (
    DecoderConfig,
    Execution,
    ExpertConfig,
    MultimodalConfig,
    MultimodalLM,
    NativeViTConfig,
    ProjectorConfig,
    ViTConfig,
)  # fmt: skip
from mm_jax.parallel.mesh import MeshConfig, make_mesh
from mm_jax.parallel.rules import Rules, place_tree, put_batch
from mm_jax.train import losses
from mm_jax.train.setup import apply_of
from tests.tiny import random_params

VOCAB, LENGTH, ROWS = 96, 80, 8
MESHES = {
    "fsdp 8": MeshConfig(fsdp=8),
    "tensor 4 x data 2": MeshConfig(tensor=4, data=2),
    "context 4 x fsdp 2": MeshConfig(context=4, fsdp=2),
    "expert 4 x data 2": MeshConfig(expert=4, data=2),
}
SIZES = dict(
    vocab_size=VOCAB, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=48,
    tie_embeddings=False,
)  # fmt: skip
PICTURES = dict(
    vision=ViTConfig(16, 16, 4, 24, num_layers=1, num_heads=2, mlp_dim=32),
    image_projector=ProjectorConfig("mlp", hidden_dim=32), audio=None,
)  # fmt: skip
MODELS = {
    "LLaVA": MultimodalConfig(**PICTURES, decoder=DecoderConfig(**SIZES)),
    "Qwen2-VL": MultimodalConfig(
        vision=NativeViTConfig(patch_size=4, embed_dim=32, num_layers=1, num_heads=4, mlp_dim=48),
        audio=None,
        image_projector=ProjectorConfig(
            "mlp", merge=(4, 1), hidden_dim=128, norm_each=True, activation="gelu"
        ),
        decoder=DecoderConfig(**SIZES, qkv_bias=True, rope_sections=(2, 1, 1)),
    ),
    "MoE": MultimodalConfig(
        **PICTURES, decoder=DecoderConfig(**SIZES, qk_norm=True, experts=ExpertConfig(8, 2, mlp_dim=24))
    ),
}
PATCHES = PatchLayout(merge=2)


def example(
    random: np.random.Generator, model: MultimodalConfig, grid: tuple[int, int, int] | None
) -> Example:
    """Three words, a picture of `grid` patches (of one size for LLaVA) if any, seven words; the last five train."""
    arrays, features, medium = {}, np.arange(0), []
    if grid is not None and model.native:
        values = random.normal(size=(int(np.prod(grid)), model.vision.patch_dim)).astype(np.float32)
        medium = [Medium(values, grid)]
        arrays, features = slots(medium[0], PATCHES)
    elif grid is not None:
        arrays = {"pixel_values": random.normal(size=(1, 16, 16, 3)).astype(np.float32)}
        features = np.arange(model.image_tokens)
    elif model.native:
        arrays = {
            name: np.zeros((0, *shape), kind) for name, shape, kind in PATCHES.arrays(model.vision.patch_dim)
        }
    tokens = 10 + len(features)
    index = np.full(tokens, -1, np.int32)
    index[3 : 3 + len(features)] = features
    places = (
        positions(index >= 0, medium, PATCHES.merge) if model.native else np.arange(tokens, dtype=np.int32)
    )
    return Example(
        tokens=random.integers(0, VOCAB, tokens).astype(np.int32),
        loss_weights=(np.arange(tokens) >= tokens - 5) * random.uniform(0.5, 1, tokens).astype(np.float32),
        segments=np.ones(tokens, np.int32),
        positions=places,
        image_index=index,
        audio_index=np.full(tokens, -1, np.int32),
        pixel_values=np.zeros((0, 16, 16, 3), np.float32) if model.native else arrays.get(
            "pixel_values", np.zeros((0, 16, 16, 3), np.float32)
        ),
        audio_values=np.zeros((0, 1, 1), np.float32),
        audio_frames=np.zeros(0, np.int32),
        source="a",
        slots=arrays if model.native else {},
    )  # fmt: skip


def packed(model: MultimodalConfig) -> dict[str, np.ndarray]:
    """Rows of up to three conversations, with pictures of several sizes or none."""
    random = np.random.default_rng(0)
    grids = [(1, 4, 6), (1, 2, 4), None, (2, 4, 2)]
    rows = [[example(random, model, grids[(k + j) % 4]) for j in range(2 + k % 2)] for k in range(ROWS)]
    layout = Layout(image_tokens=model.image_tokens, image_size=(16, 16))
    if model.native:
        names = PATCHES.arrays(model.vision.patch_dim)
        layout = Layout(slot_arrays=names, position_axes=3, patches=PATCHES)
    images = 60 if model.native else 3
    return collate(rows, BatchConfig(ROWS, LENGTH, images=images), layout, {"a": 0})


def gradients(name: str, mesh: str | None) -> dict[str, np.ndarray]:
    """{path: gradient} of the mean loss, with the loss itself as "loss"."""
    model, rules = MODELS[name], Rules()
    devices = make_mesh(MESHES[mesh]) if mesh else make_mesh(devices=jax.devices()[:1])
    params = random_params(model, 0)
    where = place_tree(params, params, devices, rules)
    apply, loss = apply_of(MultimodalLM(model, Execution(devices, rules.axes()))), losses.next_token(("a",))

    def total(params, batch):
        sums, _ = loss.numerators(apply, params, batch)
        return sums["loss"] / loss.denominators(batch)["loss"]

    step = jax.jit(jax.value_and_grad(total), out_shardings=(None, where))
    batch = put_batch(packed(model), devices, rules)
    value, found = step(jax.device_put(params, where), batch)
    flat = {path: np.asarray(x) for path, x in flatten_dict(found, sep="/").items()}
    return {**flat, "loss": np.asarray(value)}


def compare(pairs: str) -> None:
    """In a process with eight devices: prints the largest difference of each (model, mesh), as a part of the largest
    gradient and absolute."""
    results: dict[str, dict] = {}
    known: dict[str, dict] = {}
    for name, mesh in json.loads(pairs):
        one = known.setdefault(name, gradients(name, None)) if name not in known else known[name]
        ours = gradients(name, mesh)
        worst = max(one, key=lambda path: np.abs(ours[path] - one[path]).max())
        results[f"{name}, {mesh}"] = {
            "difference": float(np.abs(ours[worst] - one[worst]).max()),
            "where": worst,
            "loss": float(one["loss"]),
            "least": min(float(np.abs(x).max()) for path, x in one.items() if not path.endswith("key/bias")),
        }
    print("RESULTS " + json.dumps(results))


def run(pairs: list[tuple[str, str]]) -> dict[str, dict]:
    here = Path(__file__)
    program = f"import sys; sys.path.insert(0, {str(here.parent)!r}); import {here.stem} as t; t.compare(sys.argv[1])"
    path = os.pathsep.join([str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(pairs)],
        capture_output=True, text=True, env=environment, timeout=2400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("RESULTS ")[2])


def check(pairs: list[tuple[str, str]]) -> None:
    for name, found in run(pairs).items():
        assert found["difference"] < 1e-5, (name, found)
        assert 1 < found["loss"] < 20 and found["least"] > 1e-4, (name, found)  # all parameters matter


def test_rows_in_parts_and_experts_apart_give_what_one_device_gives() -> None:
    check([("Qwen2-VL", "context 4 x fsdp 2"), ("MoE", "expert 4 x data 2")])


@pytest.mark.slow
def test_every_model_on_every_mesh_gives_what_one_device_gives() -> None:
    check([(name, mesh) for name in MODELS for mesh in MESHES])


def test_the_rows_are_packed() -> None:
    for model in MODELS.values():
        batch = packed(model)
        assert batch["segment_ids"].max() == 3 and (batch["media_index"] >= 0).sum() > 50
        assert jnp.asarray(batch["loss_weights"]).min() == 0
