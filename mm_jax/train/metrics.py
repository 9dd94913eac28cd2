"""What a run reports: metrics.jsonl, TensorBoard, and the counts behind tokens/s, padding and MFU."""

import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mm_jax.models import MultimodalConfig
from mm_jax.models.flops import Work, train_flops
from mm_jax.parallel.chips import chip_of


@dataclass
class Counts:
    """What the batches of an interval held."""

    slots: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    samples: int = 0
    token_pairs: int = 0
    images: int = 0
    clips: int = 0
    media_slots: int = 0
    patches: int = 0
    frame_pairs: int = 0

    def add(self, batch: dict[str, np.ndarray]) -> None:
        """Counts a host batch, [B, ...] or [A, B, ...]."""
        segments = batch["segment_ids"].reshape(-1, batch["segment_ids"].shape[-1])
        lengths = _segment_lengths(segments)
        self.slots += segments.size
        self.tokens += int(lengths.sum())
        self.trainable_tokens += int((batch["loss_weights"] > 0).sum())
        self.samples += len(lengths)
        self.token_pairs += int((lengths * (lengths + 1) // 2).sum())
        if "patch_segment_ids" in batch:
            frames = batch["patch_segment_ids"].reshape(-1, batch["patch_segment_ids"].shape[-1])
            sizes = _segment_lengths(frames)
            self.patches += int(sizes.sum())
            self.frame_pairs += int((sizes**2).sum())
        if "image_segment_ids" in batch:
            self.images += int((batch["image_segment_ids"] > 0).sum())
            self.media_slots += batch["image_segment_ids"].size
        if "audio_segment_ids" in batch:
            self.clips += int((batch["audio_segment_ids"] > 0).sum())
            self.media_slots += batch["audio_segment_ids"].size

    def join(self, other: dict[str, int]) -> None:
        """Adds the fields of another one."""
        for name, count in other.items():
            setattr(self, name, getattr(self, name) + count)


def rates(
    counts: Counts, seconds: float, model: MultimodalConfig, parts: list[str], dense: bool
) -> dict[str, float]:
    """Speeds of an interval; `parts`: top-level names that train; `dense`: the stage has no decoder.

    `counts`: of all processes.
    """
    work = Work(
        0 if dense else counts.tokens,
        0 if dense else counts.token_pairs,
        counts.images,
        counts.clips,
        counts.patches,
        counts.frame_pairs,
    )
    used, slots = counts.tokens, counts.slots
    if dense:  # only media are computed there: an unused slot is the padding
        used, slots = counts.images + counts.clips, counts.media_slots
    flops = train_flops(model, work, parts)
    return {
        "tokens_per_second": counts.tokens / seconds,
        "trainable_tokens_per_second": counts.trainable_tokens / seconds,
        "samples_per_second": counts.samples / seconds,
        "trainable_tokens": counts.trainable_tokens,
        "padding": 1 - used / slots,
        "mfu": flops / seconds / (peak_flops() * jax.device_count()),
    }


@cache
def peak_flops() -> float:
    """FLOP/s that one local device can reach: a known bfloat16 peak, else a float32 matmul timed once."""
    if (chip := chip_of(jax.local_devices()[0])) is not None:
        return chip.flops
    size, repeats = 1024, 4
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    multiply(x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def average(fetched: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Metrics of several steps, {name: [numerator, denominator]} each, averaged; unseen ones are left out."""
    result = {}
    for name in fetched[0]:
        numerator, denominator = np.sum([metrics[name] for metrics in fetched], axis=0, dtype=np.float64)
        if denominator > 0:
            result[name] = float(numerator / denominator)
    return result


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard under a run directory.

    Lines after (stage, step) where the run goes on are removed first, so a resumed run has every step once.
    """

    def __init__(self, run_dir: Path, offsets: dict[str, int], stage: str, step: int):
        from tensorboardX import SummaryWriter

        self._offsets = offsets
        self.path = run_dir / "metrics.jsonl"
        start = offsets[stage] + step
        kept = [
            line for line in read_metrics(run_dir) if offsets.get(line["stage"], 0) + line["step"] <= start
        ]
        temporary = run_dir / "metrics.jsonl.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        self._file = self.path.open("a")
        purge = start + 1 if kept else None
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def write(self, stage: str, step: int, values: dict[str, Any]) -> None:
        """One line; `step` counts within the stage, TensorBoard gets the step of the whole run."""
        self._file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{stage}/{name}", value, self._offsets[stage] + step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line cut short by a crash is left out."""
    return read_lines(Path(run_dir) / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file up to one that is cut short; none without the file."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _segment_lengths(segments: np.ndarray) -> np.ndarray:
    """Tokens of every segment of every row of [rows, S]."""
    rows = np.arange(len(segments))[:, None] * (segments.max(initial=0) + 1)
    _, lengths = np.unique((rows + segments)[segments > 0], return_counts=True)
    return lengths
