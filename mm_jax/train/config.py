"""A run as data: the model, the processor, the sources and a list of stages, all frozen dataclasses."""

import json
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from mm_jax.data.pipeline import BatchConfig
from mm_jax.data.processor import AnswerWeight, ProcessorConfig
from mm_jax.data.sources import SourceConfig
from mm_jax.errors import UserError, nearest
from mm_jax.models import MultimodalConfig
from mm_jax.models.execution import Exchange, Kernel, Remat
from mm_jax.parallel.mesh import MeshConfig
from mm_jax.parallel.rules import Rules
from mm_jax.serialize import first_difference, from_json, to_json


@dataclass(frozen=True)
class OptimizerConfig:
    """The learning rate rises linearly over `warmup_steps`, may stay there, then falls by a cosine."""

    kind: Literal["adamw", "muon", "adafactor"] = "adamw"
    """muon: orthogonalised momentum for the matrices inside the model (Jordan et al. 2024; step sizes as in Liu
    et al. 2025, Moonlight) and AdamW for the rest. Learns from fewer samples. adafactor: second moments of matrices as
    a row and a column, no first moment (Shazeer and Stern 2018): nearly no memory."""
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    final_fraction: float = 0.02
    """Learning rate of the last step, as a fraction of `learning_rate`."""
    decay_fraction: float = 1.0
    """The last part of the steps, in which the rate falls; below 1 it is held before (Hu et al. 2024, MiniCPM)."""
    weight_decay: float = 0.02
    """Not applied to norms, biases, embeddings and other 1-d parameters."""
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.98
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the first moment of adamw and muon."""


@dataclass(frozen=True)
class PreferenceConfig:
    """How a preference stage gets its pairs: from the model's own answers to questions of the mixture."""

    tasks: tuple[str, ...] = ("exists",)
    """Question types (`Message.task`) to ask."""
    right_answers: tuple[str, ...] = ()
    """Only questions with one of these right answers, such as "no" against claims about absent things."""
    questions: int = 2000
    """Questions asked; each wrong answer becomes a pair."""
    pairs: int = 400
    """Pairs wanted. When the model makes fewer mistakes, the wrong answers it finds likeliest fill up."""


@dataclass(frozen=True)
class Stage:
    """One stage: a mixture, the paths that move, a loss and a schedule."""

    steps: int
    mixture: dict[str, float]
    """Source name -> weight; a source is drawn with probability proportional to its weight."""
    trainable: tuple[str, ...]
    """Regular expressions for the leading components of parameter paths: "decoder", ".*_projector"."""
    batch: BatchConfig
    loss: Literal["dense", "next_token", "preference"] = "next_token"
    optimizer: OptimizerConfig = OptimizerConfig()
    media: bool = True
    """False drops images and audio from the samples: the language stage."""
    answer_weight: AnswerWeight = "sqrt"
    """Every answer token weighs 1, or 1/sqrt(answer length), so that long answers do not drown short ones, or
    1/(answer length)."""
    template: str = ""
    """Chat template in Jinja of this stage alone, for runs whose processor comes from a Hugging Face directory."""
    naming: float = 0.0
    """next_token: weight of naming, at every picture and sound token, what the regions of the data say is there.
    It brings the projected features to where the language model has its words. 0 for data without regions."""
    chunk: int = 0
    """next_token: tokens of a row whose logits exist at one time, which saves memory with large vocabularies; 0 for
    all. It must divide batch.length."""
    positive_weight: float = 4.0
    """dense: weight of a position that has a label against one that has none."""
    beta: float = 0.1
    """preference: strength of the pull towards the reference model (DPO)."""
    preference: PreferenceConfig = PreferenceConfig()


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep; the end of every stage is always saved."""

    every_steps: int = 500
    every_minutes: float = 30.0
    """Also after so long without a save, looked at when a line is logged; 0 for by steps alone."""
    keep_last: int = 2
    keep_best: int = 1
    """Checkpoints with the lowest training loss since the save before, kept beside the last ones."""


@dataclass(frozen=True)
class SkipConfig:
    """Which updates are not done. Their batches are written to skipped.jsonl in the run directory.

    What is not finite is always skipped.
    """

    spike: float = 10.0
    """A loss or gradient norm of more than so many times its running average is skipped; 0 for none. The average is
    looked at after the first 50 steps of a stage, and a lasting change of level becomes usual after about 15 steps."""
    limit: int = 10
    """Updates skipped one after another that stop the run."""


@dataclass(frozen=True)
class InitConfig:
    """Where the first weights come from. What is said nothing of starts fresh.

    With a checkpoint, the model is the whole system of a Hugging Face directory, whatever `RunConfig.model` says but
    for its dtype, with its tokenizer, chat template and rules for media; the run can be written as such a directory
    again.

    With a decoder and no checkpoint, a new model is put together: the encoders that are named here and the decoder are
    those of the checkpoints, whatever `RunConfig.model` says of them, and between them stand its projectors. The
    tokenizer and chat template are those of the decoder's directory, with a token for each kind of media added, and how
    pictures and clips are prepared says the encoder's.

    In both cases `RunConfig.processor` must be None.
    """

    run: str = ""
    """Another run's directory: the newest weights of the parts that both models have, and its tokenizer."""
    stage: str = ""
    """Of that run."""
    checkpoint: str = ""
    """Hugging Face directory of a whole system. Directories of a decoder, vision tower or audio encoder beside it give
    the weights of these parts in its place; their sizes must be the same, but a vocabulary may be smaller."""
    fresh: tuple[str, ...] = ()
    """Regular expressions, as in `Stage.trainable`, for parameters of the checkpoint that start at random."""
    template: str = ""
    """Chat template in Jinja in place of the directory's. `{% generation %}` marks what to learn, where that is not
    the assistant's messages."""
    decoder: str = ""
    """Hugging Face directory of a decoder, or of a system that has one."""
    vision: str = ""
    """The same of a vision tower."""
    audio: str = ""
    """The same of an audio encoder."""
    vision_layers: tuple[int, ...] = ()
    """Which hidden states the tower gives out, -1 for those after its last block; empty for its own output."""
    keep_class_token: bool = False
    """Give out that of a vision tower as well."""
    audio_seconds: float = 0.0
    """Window of an audio encoder that takes any length (a Conformer); 0 for 30 s. Longer clips take several."""

    @property
    def pretrained(self) -> bool:
        """Whether the processor comes from a Hugging Face directory."""
        return bool(self.checkpoint or self.decoder)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the result of a run."""

    name: str
    model: MultimodalConfig
    processor: ProcessorConfig | None
    """None for that of `init.checkpoint` or `init.decoder`."""
    sources: dict[str, SourceConfig]
    stages: dict[str, Stage]
    init: InitConfig = InitConfig()
    vocab_size: int = 2048
    """Wanted size of the tokenizer trained on the run's own text; small text may give fewer."""
    seed: int = 0
    data_dir: str = "data"
    """Directory of the TFDS data sets."""
    tokenizer_conversations: int = 20_000
    """Conversations of each source from which tokenizer and label words are made."""
    strict: bool = False
    """Stop at the first unusable sample instead of counting and skipping it."""
    workers: int = 0
    """Processes that prepare samples; 0 prepares them in background threads."""
    log_every: int = 20
    mesh: MeshConfig = MeshConfig()
    rules: Rules = Rules()
    remat: Remat = "none"
    """What the backward pass keeps of each layer, see `mm_jax.models.Execution`."""
    attention: Kernel = "auto"
    context: Exchange = "ring"
    """How attention works on rows that mesh.context has in parts."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    skip: SkipConfig = SkipConfig()


# Fields that may change between two starts of one run, because they do not change what it computes.
FREE_FIELDS = (
    "name", "data_dir", "workers", "log_every", "checkpoint", "strict", "mesh", "rules", "remat", "attention",
    "context",
)  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a Python file with `get_config()`, changed by `--dotted.field value` overrides.

    >>> load_config("configs/quickstart.py", ["--stages.align.steps", "100"])  # doctest: +SKIP

    Raises:
        UserError: no such file, no `get_config`, an unknown field (the nearest name is offered).
    """
    path = Path(path)
    if not path.is_file():
        known = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f'there is no config "{path}"' + (nearest(str(path), known) if known else ""))
    namespace = runpy.run_path(str(path))
    if "get_config" not in namespace:
        raise UserError(f"{path} has no function get_config()")
    base = namespace["get_config"]()
    if not isinstance(base, RunConfig):
        raise UserError(f"{path}: get_config() returns {type(base).__name__}, RunConfig is needed")
    config = override(base, overrides, prog=f"python -m mm_jax train {path}")
    check(config)
    return config


def override(base: RunConfig, arguments: Sequence[str], prog: str = "mm_jax") -> RunConfig:
    """`base` with `--dotted.field value` (or `=value`) replaced; `--help` prints all fields and exits."""
    known = _dotted(to_json(base))
    spread: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and name != "--help":
            plain = name[2:].replace("-", "_")
            last = plain.rpartition(".")
            negated = f"{last[0]}.{last[2][3:]}".lstrip(".") if last[2].startswith("no_") else plain
            if plain not in known and negated not in known:
                raise UserError(f'unknown option "{name}"{nearest(plain, known)}')
        spread += [name, value] if equals and name.startswith("--") else [argument]
    if not spread:
        return base
    return tyro.cli(
        RunConfig,
        default=base,
        args=spread,
        prog=prog,
        config=(tyro.conf.AvoidSubcommands,),
        description="Any field of the config, for example: --stages.align.steps 100",
    )


def check(config: RunConfig) -> None:
    """Mistakes that a config can show without data or model.

    Raises:
        UserError: the first one found.
    """
    check_init(config)
    if not config.stages:
        raise UserError("stages is empty: a run needs at least one stage")
    for name, stage in config.stages.items():
        where = f"stages.{name}"
        if not name.isidentifier():
            raise UserError(f'stage name "{name}" is not a plain name: it becomes a directory')
        if stage.steps < 1:
            raise UserError(f"{where}.steps is {stage.steps}, at least 1 is needed")
        if not stage.mixture:
            raise UserError(f"{where}.mixture is empty: name at least one source")
        for source, weight in stage.mixture.items():
            if source not in config.sources:
                raise UserError(f'{where}.mixture names "{source}"{nearest(source, config.sources)}')
            if not weight > 0:
                raise UserError(f"{where}.mixture.{source} is {weight}, a weight above 0 is needed")
        if stage.batch.accumulate < 1 or stage.batch.rows < 1:
            raise UserError(f"{where}.batch: rows and accumulate must be at least 1")
        if stage.loss == "preference" and stage.batch.pairs < 1:
            raise UserError(f"{where}.batch.pairs is 0: a preference stage needs pairs in every row")
        if stage.naming < 0 or (stage.naming and (stage.loss != "next_token" or not stage.media)):
            raise UserError(
                f"{where}.naming is {stage.naming}: only a next_token stage with media can name them"
            )
        if stage.chunk and (stage.loss != "next_token" or stage.batch.length % stage.chunk):
            raise UserError(
                f"{where}.chunk is {stage.chunk}: only a next_token stage has chunks, and they must divide "
                f"batch.length ({stage.batch.length})"
            )
        if stage.template and config.processor is not None:
            raise UserError(
                f"{where}.template is for runs whose processor comes from a Hugging Face directory"
            )
        if stage.optimizer.learning_rate <= 0:
            raise UserError(f"{where}.optimizer.learning_rate is {stage.optimizer.learning_rate}")
        if not 0 <= stage.optimizer.decay_fraction <= 1:
            raise UserError(
                f"{where}.optimizer.decay_fraction is {stage.optimizer.decay_fraction}, a share from 0 to 1 is needed"
            )
    config.rules.check()
    keep, skip = config.checkpoint, config.skip
    if keep.keep_last < 1:
        raise UserError("checkpoint.keep_last must be at least 1, or a run could not be resumed")
    if keep.every_steps < 1 or keep.every_minutes < 0:
        raise UserError("checkpoint.every_steps must be at least 1 and every_minutes at least 0")
    if skip.limit < 1 or (skip.spike and not skip.spike > 1):
        raise UserError(
            f"skip.limit is {skip.limit} and skip.spike {skip.spike}: at least 1, and above 1 or 0, are needed"
        )


def check_init(config: RunConfig) -> None:
    """Raises UserError where the fields of `init` contradict each other or the rest."""
    init = config.init
    parts = {name: getattr(init, name) for name in ("decoder", "vision", "audio")}
    if init.run and (init.checkpoint or any(parts.values())):
        raise UserError(
            "init.run is another run with all its parts: leave init.checkpoint, decoder, vision and audio empty"
        )
    if init.stage and not init.run:
        raise UserError(f'init.stage is "{init.stage}", but there is no init.run')
    if init.fresh and not init.checkpoint:
        raise UserError("init.fresh is for parameters of init.checkpoint, which is empty")
    if init.checkpoint and (init.vision_layers or init.keep_class_token):
        raise UserError(
            "init.checkpoint says what its tower gives out: leave vision_layers and keep_class_token"
        )
    if not init.pretrained:
        if init.vision or init.audio or init.template:
            raise UserError(
                "init.vision, audio and template need init.decoder, whose tokenizer the run has, or init.checkpoint"
            )
        if config.processor is None and not init.run:
            raise UserError(
                "processor is None: only a run with init.checkpoint or init.decoder has one from there"
            )
        return
    if config.processor is not None:
        raise UserError("processor must be None: that of init.checkpoint or init.decoder is taken")
    for name in ("vision", "audio") if not init.checkpoint else ():
        if getattr(config.model, name) is not None and not parts[name]:
            raise UserError(
                f"model.{name} is set, but init.{name} is not: name a checkpoint, or set it to None"
            )
    for name, stage in config.stages.items():
        if stage.loss == "dense":
            raise UserError(
                f"stages.{name}: a run with init.checkpoint or init.decoder has stages with the losses next_token and "
                "preference"
            )


def save_config(config: RunConfig, run_dir: Path) -> None:
    """Writes `config.json` whole or not at all."""
    text = json.dumps(to_json(config), indent=1)
    temporary = run_dir / "config.json.tmp"
    temporary.write_text(text + "\n")
    temporary.replace(run_dir / "config.json")


def read_config(run_dir: str | Path) -> RunConfig:
    """The config of a run directory.

    Raises:
        UserError: no run there, or `config.json` is damaged or of another version.
    """
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise UserError(f'"{run_dir}" is not a run directory (no config.json in it)')
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return from_json(RunConfig, value, str(path))


def check_same_run(config: RunConfig, run_dir: Path) -> None:
    """Raises UserError naming the first field in which `config` differs from the run in `run_dir`."""
    found = first_difference(to_json(config), to_json(read_config(run_dir)), ignore=FREE_FIELDS)
    if found:
        path, ours, theirs = found
        raise UserError(
            f'"{run_dir}" holds a run of another config: {path} is {theirs!r} there and {ours!r} here; '
            "choose another --run directory or use the same config"
        )


def _dotted(value: Any, where: str = "") -> list[str]:
    if not isinstance(value, dict):
        return [where]
    return [name for key, item in value.items() for name in _dotted(item, f"{where}.{key}".lstrip("."))]
