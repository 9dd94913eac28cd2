"""`bench`: how fast a training step is here, beside torch and transformers where they are installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_jax.cli.arguments import split_arguments
from mm_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from mm_jax.train.bench import Speed
    from mm_jax.train.config import RunConfig

HELP = """usage: python -m mm_jax bench CONFIG.py [--stage NAME] [--steps N] [--alone] [--any.field value ...]

Times the training step of a stage on random data of its shape. Where torch and transformers are installed and the model
is a LLaVA (CLIP, MLP, Llama; all of it trains; AdamW), the same steps run there afterwards, on the same device.

  --stage NAME       (default: the last one)
  --steps N          timed steps, after three more (10)
  --alone            without torch
  --json FILE        also write the numbers there; - for standard output

example: python -m mm_jax bench configs/bench.py --steps 5"""

WARMUP = 2


def main(argv: Sequence[str]) -> int:
    parsed = split_arguments(argv, HELP, options=("stage", "steps", "json"), flags=("alone",))
    if parsed is None:
        return 0
    from mm_jax.train.bench import measure
    from mm_jax.train.config import load_config
    from mm_jax.train.setup import enable_compilation_cache
    from mm_jax.train.start import planned_config

    config = planned_config(load_config(parsed.path, parsed.rest))
    name = parsed.options.get("stage", list(config.stages)[-1])
    if name not in config.stages:
        raise UserError(f'the config has no stage "{name}"{nearest(name, config.stages)}')
    steps = parsed.options.get("steps", "10")
    if not steps.isdigit() or steps == "0":
        raise UserError(f"--steps is {steps}; a whole number from 1 is needed")
    enable_compilation_cache()
    speeds = [measure(config, name, int(steps), WARMUP)]
    reason = "--alone" if "alone" in parsed.flags else no_peer(config, name)
    if not reason:
        speeds.append(measure_torch(config, name, int(steps)))
    values = {"stage": name, "speeds": [dataclasses.asdict(speed) for speed in speeds]}
    if len(speeds) == 2:
        values["times_as_fast"] = speeds[1].step_seconds / speeds[0].step_seconds
    text = json.dumps(values, indent=1)
    if parsed.options.get("json") == "-":
        print(text)
        return 0
    print(table(speeds))
    if len(speeds) == 2:
        print(f"{values['times_as_fast']:.2f} x as fast as torch")
    else:
        print(f"without torch: {reason}")
    if "json" in parsed.options:
        try:
            Path(parsed.options["json"]).write_text(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {parsed.options['json']}: {error.strerror}") from None
    return 0


def table(speeds: Sequence[Speed]) -> str:
    """Markdown, one line a program."""
    lines = [
        "| | step | fastest to slowest | tokens/s | samples/s | MFU | memory | first step |",
        "|---|" + "---:|" * 7,
    ]
    for s in speeds:
        low, high = s.spread
        lines.append(
            f"| {s.what} | {s.step_seconds:.3f} s | {low:.3f} to {high:.3f} s | {s.tokens_per_second:.0f} | "
            f"{s.samples_per_second:.2f} | {s.mfu:.0%} | {s.memory / 1e9:.2f} GB | {s.first_step_seconds:.1f} s |"
        )
    return "\n".join(lines)


def no_peer(config: RunConfig, name: str) -> str:
    """Why the same work cannot be done in torch; empty when it can."""
    lacking = [module for module in ("torch", "transformers") if importlib.util.find_spec(module) is None]
    if lacking:
        return f"{' and '.join(lacking)} is not installed"
    stage, model = config.stages[name], config.model
    vision, decoder = model.vision, model.decoder
    same = (
        vision is not None and model.audio is None and model.heads is None
        and vision.class_token == "drop" and vision.pre_norm and not vision.post_norm and not vision.patch_bias
        and not vision.stem and vision.activation == "quick_gelu" and vision.height == vision.width
        and model.image_projector.kind == "mlp" and model.image_projector.hidden_dim == decoder.embed_dim
        and decoder.gated and decoder.norm == "rms" and decoder.activation == "silu" and not decoder.qk_norm
        and stage.loss == "next_token" and not stage.naming and stage.batch.accumulate == 1
        and stage.optimizer.kind == "adamw"
        and {"vision", "image_projector", "decoder"} <= set(stage.trainable)
    )  # fmt: skip
    return "" if same else "the stage is not the training of a whole LLaVA with AdamW"


def spec_of(config: RunConfig, name: str, steps: int) -> dict[str, Any]:
    """What `mm_jax.bench_torch` reads."""
    stage, vision, decoder = config.stages[name], config.model.vision, config.model.decoder
    adam = stage.optimizer
    return {
        "vision": {
            "hidden_size": vision.embed_dim, "intermediate_size": vision.mlp_dim, "image_size": vision.height,
            "num_hidden_layers": vision.num_layers, "num_attention_heads": vision.num_heads,
            "patch_size": vision.patch_size,
        },
        "text": {
            "vocab_size": decoder.vocab_size, "hidden_size": decoder.embed_dim, "intermediate_size": decoder.mlp_dim,
            "num_hidden_layers": decoder.num_layers, "num_attention_heads": decoder.num_heads,
            "num_key_value_heads": decoder.num_kv_heads, "head_dim": decoder.head_dim,
            "tie_word_embeddings": decoder.tie_embeddings,
        },
        "rows": stage.batch.rows, "length": stage.batch.length, "images": stage.batch.images,
        "image_tokens": config.model.image_tokens, "steps": steps, "dtype": config.model.dtype,
        "clip_norm": adam.clip_norm,
        "optimizer": {
            "lr": adam.learning_rate, "betas": [adam.beta1, adam.beta2], "weight_decay": adam.weight_decay,
        },
    }  # fmt: skip


def measure_torch(config: RunConfig, name: str, steps: int) -> Speed:
    """The steps in a process of their own, since both programs would fight for the same threads.

    Raises:
        UserError: that process failed.
    """
    from mm_jax.train.bench import random_batch, summary
    from mm_jax.train.metrics import Counts

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "spec.json"
        path.write_text(json.dumps(spec_of(config, name, 1 + WARMUP + steps)))
        command = [sys.executable, "-m", "mm_jax.bench_torch", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"the torch process failed: {lines[-1]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    counts = Counts()
    counts.add(random_batch(config, name))
    parts = ["decoder", "image_projector", "vision"]
    return summary("torch", found["seconds"], WARMUP, counts, config, parts, found["memory"])
