"""`data`: generate the data sets of a config, or show what its sources hold."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm_jax.cli.arguments import split_arguments
from mm_jax.errors import UserError, nearest

if TYPE_CHECKING:
    from mm_jax.data.example import Example
    from mm_jax.data.messages import Conversation
    from mm_jax.data.pretrained import PretrainedProcessor
    from mm_jax.data.processor import Processor
    from mm_jax.train.config import RunConfig

HELP = """usage: python -m mm_jax data prepare|show CONFIG.py [--any.field value ...]

  prepare   generate the mm_jax_quickstart data sets that the config names and data_dir lacks
  show      conversations, lengths and dropped samples by source, and an example with its loss mask

example: python -m mm_jax data show configs/quickstart.py"""

BUILDER = "mm_jax_quickstart"
SHOWN = 200  # conversations looked at by source


def main(argv: Sequence[str]) -> int:
    actions = {"prepare": make_missing, "show": show}
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    action, *rest = argv
    if action not in actions:
        raise UserError(f'unknown action "{action}"{nearest(action, actions)}')
    parsed = split_arguments(rest, HELP)
    if parsed is None:
        return 0
    from mm_jax.train.config import load_config

    actions[action](load_config(parsed.path, parsed.rest))
    return 0


def make_missing(config: "RunConfig") -> None:
    """Generates the quickstart data sets named by the sources of `config` where `data_dir` lacks them."""
    names = [s.path.partition("/")[2] for s in config.sources.values()
             if s.kind == "tfds" and s.path.partition("/")[0] == BUILDER]  # fmt: skip
    if names:
        from mm_jax.data.quickstart import prepare

        prepare(sorted(set(names)), config.data_dir)


def show(config: "RunConfig") -> None:
    """Prints a table of the sources and one rendered example each; answer tokens stand in [brackets]."""
    import numpy as np

    from mm_jax.data.sources import open_source
    from mm_jax.train.setup import sample

    make_missing(config)
    sources = {name: open_source(name, s, config.data_dir) for name, s in config.sources.items()}
    looked = {name: sample(source, SHOWN) for name, source in sources.items()}
    processor, encoders = encoders_of(config, [c for cs in looked.values() for c in cs])
    print(
        f"{'source':16} {'samples':>8} {'dropped':>8} {'length':>15} {'answer':>8} {'images':>7} {'audio':>6} "
        f"{'slots':>11}"
    )
    shown = []
    for name, conversations in looked.items():
        examples = []
        for conversation in conversations:
            try:
                examples.append(encoders[name](conversation))
            except UserError:
                continue
        if not examples:
            print(f"{name:16} {len(sources[name]):8} {len(conversations):8}")
            continue
        lengths = [len(e.tokens) for e in examples]
        answer = np.mean([(e.loss_weights > 0).sum() for e in examples])
        images = np.mean([len(e.transforms) for e in examples])
        audio = np.mean([e.num_audio for e in examples])
        slots = [e.num_images + e.num_audio for e in examples]
        print(
            f"{name:16} {len(sources[name]):8} {len(conversations) - len(examples):8} "
            f"{min(lengths):5}{np.mean(lengths):5.0f}{max(lengths):5} "
            f"{answer:8.1f} {images:7.1f} {audio:6.1f} {np.mean(slots):6.1f}{max(slots):5}"
        )
        shown.append((name, examples[0]))
    made = "" if config.processor is None else "; tokenizer made from these samples alone"
    print(f"(length in tokens: shortest, mean, longest; slots of media: mean, most{made})\n")
    for name, example in shown:
        print(f"{name}: {render(processor, example)}\n")


def encoders_of(
    config: "RunConfig", conversations: Sequence["Conversation"]
) -> tuple["Processor | PretrainedProcessor", dict[str, Callable[["Conversation"], "Example"]]]:
    """The processor that a run would have, and what it makes of the conversations of each source.

    With a processor from a checkpoint, a source is written as in the first stage that it is in.
    """
    from mm_jax.data.processor import fit_processor

    if config.processor is not None:
        processor = fit_processor(config.processor, conversations, config.vocab_size)
        return processor, dict.fromkeys(config.sources, processor.example)
    from mm_jax.train.encode import Encode
    from mm_jax.train.start import complete_config, load_processor, write_processor

    with tempfile.TemporaryDirectory() as directory:
        config = complete_config(config)
        write_processor(config, (), Path(directory) / "processor")
        processor = load_processor(Path(directory), config.model)
    encoders = dict.fromkeys(config.sources, processor.example)
    for stage in reversed(config.stages.values()):
        encoders |= dict.fromkeys(stage.mixture, Encode.of(processor, stage))
    return processor, encoders


def render(processor: "Processor | PretrainedProcessor", example: "Example") -> str:
    """The tokens of an example as text, trained ones in [brackets], runs of media tokens as <image x16>."""
    pieces: list[str] = []
    position, inside = 0, False
    while position < len(example.tokens):
        image, audio = example.image_index[position] >= 0, example.audio_index[position] >= 0
        kind = "image" if image else "audio" if audio else ""
        trained = bool(example.loss_weights[position] > 0)
        if trained != inside:
            pieces.append("[" if trained else "]")
            inside = trained
        end = position + 1
        while end < len(example.tokens) and _same(example, position, end):
            end += 1
        if kind:
            pieces.append(f"<{kind} x{end - position}>")
        else:
            pieces.append(processor.shown(example.tokens[position:end]))
        position = end
    return "".join(pieces) + ("]" if inside else "")


def _same(example: "Example", a: int, b: int) -> bool:
    media = [(example.image_index[i] >= 0, example.audio_index[i] >= 0) for i in (a, b)]
    return media[0] == media[1] and (example.loss_weights[a] > 0) == (example.loss_weights[b] > 0)
