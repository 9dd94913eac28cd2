"""The programs of a run, compiled from shapes alone: no array of the model exists, and no accelerator is needed."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mm_jax.data.packing import Layout, collate
from mm_jax.families.media import layout_of
from mm_jax.inference.programs import Programs
from mm_jax.inference.sampling import Controls, Sampling, mask_words
from mm_jax.models import Execution, MultimodalLM
from mm_jax.models.flops import Work, forward_flops, train_flops
from mm_jax.parallel.chips import chip_of, memory_of
from mm_jax.parallel.hlo import analyse
from mm_jax.parallel.mesh import Demand, make_mesh
from mm_jax.parallel.rules import batch_shardings, place_tree
from mm_jax.train.config import RunConfig, Stage
from mm_jax.train.loop import stage_loss
from mm_jax.train.optimizer import schedule, tree_bytes
from mm_jax.train.plan import Plan, plan_stage, shardings_of
from mm_jax.train.setup import abstract_params, apply_of, complete_heads
from mm_jax.train.step import Step, make_step

RESERVED = 0.25 * 2**30  # bytes that the runtime keeps for itself


@dataclass(frozen=True)
class Report:
    """What the compiler says of a program; all numbers are of one chip.

    Attributes:
      arguments, outputs, temporaries: bytes; `aliased` bytes of the outputs take the place of arguments.
      peak: bytes that are in use at once.
      memory: bytes of the chip that a program can have.
      flops: that the program does, `model_flops` those that the mathematics needs.
      collectives: kind -> [calls, bytes].
      advice: what to change; empty when it fits.
    """

    program: str
    device: str
    chips: int
    mesh: dict[str, int]
    memory: float
    arguments: float = 0.0
    outputs: float = 0.0
    aliased: float = 0.0
    temporaries: float = 0.0
    peak: float = 0.0
    flops: float = 0.0
    model_flops: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict)
    collectives: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    fits: bool = True
    advice: str = ""


def abstract_batch(config: RunConfig, stage: Stage) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the batch arrays of a stage, [B, ...] or [A, B, ...].

    Of a run whose processor comes from a checkpoint, they are those of its model, without the mixtures of features that
    LLaVA-OneVision has.
    """
    if config.processor is None:
        layout = dataclasses.replace(layout_of(config.model, None, ()), names=stage.naming > 0)
    else:
        layout = Layout.of_config(
            config.processor,
            targets=stage.loss == "dense",
            names=stage.naming > 0,
            two_way=config.model.two_way,
        )
    one = collate([[]], dataclasses.replace(stage.batch, rows=1, accumulate=1), layout, {})
    if stage.batch.pairs:
        one["reference"] = np.zeros((1, stage.batch.pairs, 2), np.float32)
    rows, accumulate = stage.batch.rows, stage.batch.accumulate
    first = (rows,) if accumulate == 1 else (accumulate, rows)
    return {name: jax.ShapeDtypeStruct((*first, *x.shape[1:]), x.dtype) for name, x in one.items()}


def training_step(
    config: RunConfig, name: str, devices: Sequence[Any]
) -> tuple[Plan, Step, dict[str, jax.ShapeDtypeStruct]]:
    """The plan and the step of stage `name`, and the shapes of its batch with their shardings.

    Raises:
        UserError: the mesh does not fit the devices, or does not divide the rows or a parameter.
    """
    stage, model = config.stages[name], complete_heads(config.model, config.processor)
    plan = plan_stage(config, model, stage, devices)
    state, _ = plan.abstract_state()
    shapes = abstract_batch(config, stage)
    shardings = batch_shardings(
        {key: x.shape for key, x in shapes.items()}, plan.mesh, config.rules, stage.batch.accumulate
    )
    step = make_step(
        apply_of(MultimodalLM(model, plan.execution)),
        stage_loss(stage, tuple(sorted(stage.mixture))),
        plan.transform,
        schedule(stage.optimizer, stage.steps),
        stage.batch.accumulate,
        shardings_of(state),
        config.skip.spike,
    )
    return plan, step, {key: _with(x, shardings[key]) for key, x in shapes.items()}


def compile_train(config: RunConfig, name: str, devices: Sequence[Any]) -> Report:
    """Compiles the training step of stage `name` for `devices`.

    The vocabulary is `model.decoder.vocab_size` as it stands in the config.

    Raises:
        UserError: as `training_step`.
    """
    stage, model = config.stages[name], config.model
    plan, step, batch = training_step(config, name, devices)
    state, frozen = plan.abstract_state()
    b = stage.batch
    rows = b.rows * b.accumulate
    dense = stage.loss == "dense"
    tokens = 0 if dense else rows * b.length
    media = rows if stage.media else 0
    # of patches, as if one picture had all those of a row
    patches = media * b.images if model.patch_slots else 0
    work = Work(
        tokens, tokens * (b.length + 1) // 2, media * b.images, media * b.audio, patches, patches * b.images
    )
    needed = train_flops(model, work, sorted(state.trainable)) / len(devices)
    report = _start(f"train step of {name}: {rows} x {b.length} tokens", plan.mesh, needed)
    report = _compile(report, step, state, frozen, batch)
    if report.fits:
        return report
    tips = []
    if report.arguments > report.memory / 2:
        tips.append("more devices along mesh.fsdp or mesh.tensor, or optimizer.kind adafactor")
    if config.remat != "full":
        tips.append("--remat full")
    if not stage.chunk and stage.loss == "next_token":
        tips.append(f"--stages.{name}.chunk {min(512, b.length)}")
    tips.append(f"fewer batch.rows with more batch.accumulate, or tensor and context above 1 (rows {b.rows})")
    return dataclasses.replace(report, advice="; ".join(tips))


def compile_decode(config: RunConfig, rows: int, length: int, devices: Sequence[Any]) -> Report:
    """Compiles one decoding step over a KV cache [rows, length]; parameters are of the model's dtype.

    A mesh of which nothing is given becomes tensor parallel as far as the key/value heads go: a token that is made
    alone cannot pay for fetching parameters.

    Raises:
        UserError: as `compile_train`.
    """
    model = complete_heads(config.model, config.processor)
    decoder, mesh_config = model.decoder, config.mesh
    if not (mesh_config.data or mesh_config.fsdp or mesh_config.tensor):
        tensor = max(t for t in range(1, len(devices) + 1)
                     if len(devices) % t == 0 and decoder.num_kv_heads % t == 0)  # fmt: skip
        mesh_config = dataclasses.replace(mesh_config, tensor=tensor)
    dtype = jnp.dtype(model.dtype)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(model))
    mesh = make_mesh(mesh_config, Demand(rows, tree_bytes(shapes), decoder.num_kv_heads), devices)
    execution = Execution(mesh, config.rules.axes(), attention=config.attention)
    params = jax.tree.map(_with, shapes, place_tree(shapes, shapes, mesh, config.rules))
    programs = Programs(MultimodalLM(model, execution), params)

    def placed(key: Any, x: Any) -> jax.ShapeDtypeStruct:
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        in_cache = path.endswith(("cache/key", "cache/value"))
        names = (None, "batch", None, "kv_heads") if in_cache else ("batch",)
        return _with(x, NamedSharding(mesh, execution.spec(x.shape, *names, *[None] * (x.ndim - len(names)))))

    state = jax.eval_shape(lambda: programs.start(rows=rows, length=length))
    controls = Controls.of([Sampling()] * rows)
    allowed = np.zeros((rows, mask_words(programs.vocab_size)), np.uint32)
    state, controls, allowed, active = jax.tree_util.tree_map_with_path(
        placed, (state, controls, allowed, np.ones(rows, bool))
    )
    # a token sees the whole cache: `length` pairs each
    needed = forward_flops(model, Work(rows, rows * length))["decoder"] / len(devices)
    report = _start(f"decode step: {rows} rows, cache of {length}", mesh, needed)
    report = _compile(
        report, programs.decode, params, state, controls, allowed, active, length=length, steps=1
    )
    if report.fits:
        return report
    return dataclasses.replace(
        report, advice="more devices along mesh.tensor, fewer rows, or a shorter cache"
    )


def _with(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _start(program: str, mesh: jax.sharding.Mesh, model_flops: float) -> Report:
    device = mesh.devices.flat[0]
    reserved = RESERVED if chip_of(device) is not None else 0
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    memory = memory_of(device) - reserved
    return Report(program, device.device_kind, mesh.size, sizes, memory, model_flops=model_flops)


def _compile(report: Report, program: Any, *arguments: Any, **static: Any) -> Report:
    start = time.perf_counter()
    try:
        compiled = program.lower(*arguments, **static).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        return dataclasses.replace(
            report, fits=False, peak=_used(str(error)), seconds=time.perf_counter() - start
        )
    memory, cost = compiled.memory_analysis(), analyse(compiled.as_text())
    fixed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = fixed + memory.temp_size_in_bytes
    return dataclasses.replace(
        report,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=peak,
        flops=cost.flops,
        kernels=cost.kernels,
        collectives=cost.collectives,
        seconds=time.perf_counter() - start,
        fits=peak <= report.memory,
    )


def _used(message: str) -> float:
    """Bytes that the compiler says it would need ("Used 20.1G of 15.75G hbm"); 0 when it says nothing."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT])i?B? of", message)
    return float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]] if found else 0.0
