"""The start of a run: sources, tokenizer and labels, a model that fits them, first parameters."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mm_jax.checkpoint.run import load_params
from mm_jax.data.messages import Conversation
from mm_jax.data.pretrained import PretrainedProcessor
from mm_jax.data.processor import Processor, ProcessorConfig
from mm_jax.data.sources import Source, open_source
from mm_jax.errors import UserError
from mm_jax.families.media import layout_of
from mm_jax.models import Execution, MultimodalConfig, MultimodalLM, dummy_batch
from mm_jax.parallel import processes
from mm_jax.train.config import RunConfig, check_same_run, read_config, save_config
from mm_jax.train.start import complete_config, load_processor, write_processor


@dataclass(frozen=True)
class Setup:
    """What all stages of a run share; `model_config` has the sizes that the processor decides filled in."""

    config: RunConfig
    run_dir: Path
    processor: Processor | PretrainedProcessor
    model_config: MultimodalConfig
    sources: dict[str, Source]
    execution: Execution = Execution()

    @property
    def model(self) -> MultimodalLM:
        return MultimodalLM(self.model_config, self.execution)

    def apply(self, params: dict[str, Any], batch: dict[str, jax.Array], method: str | None = None) -> Any:
        """`model.apply` over bare params."""
        return apply_of(self.model)(params, batch, method)


def apply_of(model: MultimodalLM) -> Callable[..., Any]:
    """(params, batch, method=None) -> what the method gives: `model.apply` over bare params."""

    def apply(params: dict[str, Any], batch: Any, method: str | None = None) -> Any:
        return model.apply({"params": params}, batch, method=method)

    return apply


def prepare(config: RunConfig, run_dir: Path) -> Setup:
    """Opens or begins the run in `run_dir`. Of several processes the first one writes, the others read.

    Raises:
        UserError: the directory holds a run of another config, a source cannot be opened, or model and
            processor do not fit each other.
    """
    used = sorted({name for stage in config.stages.values() for name in stage.mixture})
    sources = {name: open_source(name, config.sources[name], config.data_dir) for name in used}
    with processes.first() as first:
        config = complete_config(config, run_dir)
        if (run_dir / "config.json").exists():
            check_same_run(config, run_dir)
        elif not first:
            raise UserError(
                f'"{run_dir}" is empty here, and process 0 has written to it: it must be one that all share'
            )
        elif run_dir.is_dir() and any(run_dir.iterdir()):
            raise UserError(f'"{run_dir}" is not empty and holds no run; choose another --run directory')
        check_model(config)
        if first:
            _write(config, run_dir, sources)
    processor = load_processor(run_dir, config.model)
    return Setup(config, run_dir, processor, complete_model(config.model, processor), sources)


def _write(config: RunConfig, run_dir: Path, sources: dict[str, Source]) -> None:
    """The config and the processor of a run, where it has none yet."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot make the run directory "{run_dir}": {error.strerror}') from None
    directory = run_dir / "processor"
    if not directory.exists():
        conversations = (c for s in sources.values() for c in sample(s, config.tokenizer_conversations))
        temporary = run_dir / "processor.tmp"
        write_processor(config, conversations, temporary)
        save_config(config, run_dir)
        temporary.replace(directory)
    save_config(config, run_dir)


def sample(source: Source, limit: int) -> list[Conversation]:
    """At most `limit` conversations, evenly spread over the source; unusable ones are left out."""
    found = []
    for index in np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int)):
        try:
            found.append(source[int(index)])
        except UserError:
            continue  # training counts and reports it
    return found


def complete_model(model: MultimodalConfig, processor: Processor | PretrainedProcessor) -> MultimodalConfig:
    """`model` with vocabulary and label counts of a fitted processor; of a pretrained one it has them already."""
    if isinstance(processor, PretrainedProcessor):
        return model
    decoder = dataclasses.replace(model.decoder, vocab_size=processor.vocab_size)
    return complete_heads(dataclasses.replace(model, decoder=decoder), processor.config)


def complete_heads(model: MultimodalConfig, config: ProcessorConfig | None) -> MultimodalConfig:
    """`model` with the label counts of a processor's config, 1 where it has none yet."""
    if model.heads is None or config is None:
        return model
    labels, bins = max(len(config.targets.labels), 1), config.targets.box_bins
    return dataclasses.replace(
        model, heads=dataclasses.replace(model.heads, num_labels=labels, box_bins=bins)
    )


def check_model(config: RunConfig) -> None:
    """Raises UserError where model, processor and stages contradict each other, naming both fields."""
    model, rules = config.model, config.processor

    def equal(ours: str, here: Any, theirs: str, there: Any) -> None:
        if here != there:
            raise UserError(f"{ours} is {here}, but {theirs} is {there}: they must be equal")

    if rules is None:
        _check_slots(config)
        for name, stage in config.stages.items():
            if stage.naming and not model.patch_slots and not all(layout_of(model, None, ()).image_grid):
                raise UserError(
                    f"stages.{name}.naming needs media tokens with a place in a picture; those of this model have none"
                )
        return
    if (model.vision is None) != (rules.image is None):
        raise UserError("model.vision and processor.image must both be set or both be None")
    if (model.audio is None) != (rules.audio is None):
        raise UserError("model.audio and processor.audio must both be set or both be None")
    if model.vision is not None:
        rule, vision = rules.image, model.vision
        equal("processor.image.height", rule.height, "model.vision.height", vision.height)
        equal("processor.image.width", rule.width, "model.vision.width", vision.width)
        equal("processor.image.num_tokens", rule.num_tokens, "the model's image tokens", model.image_tokens)
    if model.audio is not None:
        rule, audio = rules.audio, model.audio
        equal("processor.audio.num_mels", rule.num_mels, "model.audio.num_mels", audio.num_mels)
        equal("processor.audio.max_frames", rule.max_frames, "model.audio.max_frames", audio.max_frames)
        equal("processor.audio.num_tokens", rule.num_tokens, "the model's audio tokens", model.audio_tokens)
    _check_slots(config)
    for name, stage in config.stages.items():
        if stage.naming:
            check_naming(name, config)
        elif stage.loss != "dense":
            continue
        elif model.heads is None:
            raise UserError(f'stages.{name}.loss is "dense", but model.heads is None')
        if model.vision is not None:
            grid = rules.targets.image_grid
            equal("processor.targets.image_grid", tuple(grid), "the model's patch grid", model.vision.grid)
        if model.audio is not None:
            positions, given = rules.targets.audio_positions, model.audio.num_positions
            equal("processor.targets.audio_positions", positions, "the model's audio positions", given)


def _check_slots(config: RunConfig) -> None:
    audio, projector = config.model.audio, config.model.audio_projector
    if audio is not None and projector.kind in ("linear", "mlp") and audio.num_positions % projector.merge[0]:
        raise UserError(
            f"model.audio_projector.merge is {projector.merge}, which does not divide the {audio.num_positions} "
            "positions of the audio encoder's window"
        )
    block = config.model.vision.block if config.model.patch_slots else 1
    for name, stage in config.stages.items():
        if stage.batch.images % block:
            raise UserError(
                f"stages.{name}.batch.images is {stage.batch.images}; this model's slots are patches, and come in "
                f"multiples of {block}"
            )
        if stage.batch.images and config.model.vision is None:
            raise UserError(f"stages.{name}.batch.images is {stage.batch.images}, but model.vision is None")
        if stage.batch.audio and config.model.audio is None:
            raise UserError(f"stages.{name}.batch.audio is {stage.batch.audio}, but model.audio is None")


def check_naming(name: str, config: RunConfig) -> None:
    """Raises UserError where the media tokens of a naming stage do not stand for blocks of patches or frames."""
    model, rules = config.model, config.processor
    for encoder, projector in (("vision", "image_projector"), ("audio", "audio_projector")):
        if getattr(model, encoder) is not None and getattr(model, projector).kind == "resampler":
            raise UserError(
                f"stages.{name}.naming needs media tokens with a place, and model.{projector} is a resampler"
            )
    merge, block = tuple(model.image_projector.merge), tuple(rules.targets.image_block)
    if model.vision is not None and merge != block:
        raise UserError(
            f"processor.targets.image_block is {block}, but model.image_projector.merge is {merge}: they must be "
            f"equal for stages.{name}.naming"
        )


def abstract_params(model: MultimodalConfig) -> dict[str, Any]:
    """Shapes and dtypes of all parameters."""
    return jax.eval_shape(lambda: init_params(model, 0))


def init_params(model: MultimodalConfig, seed: int, shardings: Any = None) -> dict[str, Any]:
    """Random first parameters, made where `shardings` (a tree like them) says; the same seed gives the same bits."""
    init = jax.jit(
        lambda key: MultimodalLM(model).init(key, dummy_batch(model))["params"], out_shardings=shardings
    )
    return init(jax.random.key(seed))


def read_run(
    run_dir: str | Path, stage: str | None = None
) -> tuple[RunConfig, Processor | PretrainedProcessor, dict[str, Any]]:
    """(config, processor, params) of a run, of its newest checkpoint or that of `stage`.

    `config.model` is complete: `MultimodalLM(config.model).apply({"params": params}, batch)` works.

    Raises:
        UserError: no run there, an unknown stage, or no checkpoint yet.
    """
    config = read_config(run_dir)
    params = load_params(run_dir, stage)
    processor = load_processor(Path(run_dir), config.model)
    return dataclasses.replace(config, model=complete_model(config.model, processor)), processor, params


def enable_compilation_cache() -> None:
    """Keeps compiled programs under the user's cache directory; JAX_COMPILATION_CACHE_DIR wins."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "mm_jax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
