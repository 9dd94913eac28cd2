"""How fast the training step of a stage is here, on random data of its shape."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mm_jax.errors import UserError
from mm_jax.resident import peak_resident
from mm_jax.train import metrics
from mm_jax.train.ahead import abstract_batch, training_step
from mm_jax.train.config import RunConfig
from mm_jax.train.setup import complete_heads, init_params


@dataclass(frozen=True)
class Speed:
    """Medians over the timed steps; padding is not counted.

    Attributes:
      step_seconds: of one optimizer step; `spread`: the fastest and the slowest.
      mfu: model FLOP/s as a part of what the devices can do.
      first_step_seconds: the first call, compilation included.
      memory: peak bytes: of one device where it counts them, else of this process.
    """

    what: str
    step_seconds: float
    spread: tuple[float, float]
    tokens_per_second: float
    samples_per_second: float
    mfu: float
    first_step_seconds: float
    memory: float


def random_batch(config: RunConfig, name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """A full batch of stage `name`: one conversation a row, pictures and clips in all slots, then text.

    Raises:
        UserError: a stage without text, or with media of native resolution.
    """
    stage, model = config.stages[name], config.model
    shapes = abstract_batch(config, stage)
    if stage.loss != "next_token" or "patches" in shapes:
        raise UserError(f'stage "{name}": bench times next_token stages with pictures of one size')
    random = np.random.default_rng(seed)
    b = stage.batch
    media = b.images * model.image_tokens + b.audio * model.audio_tokens
    if media >= b.length:
        raise UserError(f"stages.{name}.batch.length is {b.length}, but its media alone take {media} tokens")
    place = np.arange(b.length)
    rows = {
        "segment_ids": 1,
        "positions": place,
        "media_index": np.where(place < media, place, -1),
        "loss_weights": (place >= media).astype(np.float32),
        "sources": 0,
        "image_segment_ids": 1,
        "audio_segment_ids": 1,
        "audio_frames": model.audio.max_frames if model.audio else 0,
    }
    batch = {}
    for key, x in shapes.items():
        if key == "tokens":
            batch[key] = random.integers(0, model.decoder.vocab_size, x.shape).astype(x.dtype)
        elif key in rows:
            batch[key] = np.broadcast_to(np.asarray(rows[key], x.dtype), x.shape).copy()
        elif key in ("pixel_values", "audio_values"):
            batch[key] = random.standard_normal(x.shape, np.float32)
        else:
            batch[key] = np.full(x.shape, -1, x.dtype)  # names: none
    return batch


def measure(config: RunConfig, name: str, steps: int = 10, warmup: int = 2) -> Speed:
    """Times `steps` steps of stage `name` on the devices of this machine, after `warmup` more.

    Raises:
        UserError: as `random_batch` and `mm_jax.train.ahead.training_step`.
    """
    plan, step, shapes = training_step(config, name, jax.devices())
    batch = random_batch(config, name)
    arrays = jax.device_put(batch, {key: shapes[key].sharding for key in batch})
    model = complete_heads(config.model, config.processor)
    params = init_params(model, config.seed, plan.params)
    state, frozen = plan.begin(params, jax.random.key(config.seed))
    seconds = []
    for _ in range(1 + warmup + steps):
        start = time.perf_counter()
        state, found = step(state, frozen, arrays)
        loss = float(jax.block_until_ready(found)["loss"][0])
        seconds.append(time.perf_counter() - start)
    if not np.isfinite(loss):
        raise UserError(f'the loss of stage "{name}" is not finite on random data')
    counts = metrics.Counts()
    counts.add(batch)
    return summary("mm_jax", seconds, warmup, counts, config, sorted(state.trainable), device_memory())


def summary(
    what: str,
    seconds: list[float],
    warmup: int,
    counts: metrics.Counts,
    config: RunConfig,
    parts: list[str],
    memory: float,
) -> Speed:
    """Speeds from the seconds of every step, the first one and `warmup` more left out."""
    timed = seconds[1 + warmup :]
    middle = float(np.median(timed))
    speeds = metrics.rates(counts, middle, config.model, parts, dense=False)
    return Speed(
        what, middle, (min(timed), max(timed)), speeds["tokens_per_second"], speeds["samples_per_second"],
        speeds["mfu"], seconds[0], memory,
    )  # fmt: skip


def device_memory() -> float:
    """Peak bytes of the first device, or of this process where the device does not count."""
    stats: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"])
    return float(peak_resident())
