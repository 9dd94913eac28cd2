"""`inspect`: family, parts, sizes and memory of a checkpoint, from its small files and headers alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mm_jax.cli.parser import Parser
from mm_jax.errors import UserError

if TYPE_CHECKING:
    from mm_jax.checkpoint.hf import Opened

# bytes of a parameter and what Adam keeps for it, in float32: value, gradient, two moments
TRAINING_BYTES = 16
GIB = 2**30


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "inspect",
        "What a Hugging Face checkpoint or a run is made of: family, parts, parameters, dtype, the tokens\n"
        "that a picture takes, and the memory that it needs. No weights are read.",
        "python -m mm_jax inspect path/to/llava --image 1024x768",
    )
    parser.add_argument("directory", help="Hugging Face checkpoint, or run directory")
    parser.add_argument(
        "--image", default="1024x768", metavar="WxH", help="size of a picture in pixels (1024x768)"
    )
    options = parser.parse_args(argv)
    size = re.fullmatch(r"(\d+)x(\d+)", options.image)
    if size is None or "0" in (size[1], size[2]):
        raise UserError(f'--image is "{options.image}"; width x height is needed, such as 1024x768')
    width, height = int(size[1]), int(size[2])
    if width * height > 50_000_000:
        raise UserError(f"--image is {width} x {height} pixels; at most 50000000 are read")

    from mm_jax.checkpoint.hf import is_hf  # after --help: this imports jax
    from mm_jax.checkpoint.own import is_own

    if is_own(options.directory):
        lines = _own(options.directory)
    else:
        lines = _hf(options.directory, width, height) if is_hf(options.directory) else _run(options.directory)
    names = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{names}}  {value}".rstrip())
    return 0


def _hf(directory: str, width: int, height: int) -> list[tuple[str, str]]:
    from mm_jax.checkpoint.hf import open_hf

    opened = open_hf(directory)
    bytes_ = {"float32": 4, "float16": 4, "bfloat16": 2}[opened.dtype]  # float16 is computed with in float32
    lines = [("family", f"{opened.family.name} ({', '.join(opened.family.takes)})"), ("dtype", opened.dtype)]
    lines += _parts(opened.shapes)
    if opened.unused:
        count = sum(math.prod(opened.tensors[name].shape) for name in opened.unused)
        lines.append(("not computed with", f"{len(opened.unused)} tensors, {count:,} parameters"))
    if "image" in opened.family.takes and opened.system.text is not None:
        lines.append(("picture", f"{width} x {height} pixels: {_tokens(opened, width, height)}"))
    text = opened.system.text
    length = None if text is None else text.max_length
    return lines + _memory(opened.system.config, opened.shapes, bytes_, length)


def _run(directory: str) -> list[tuple[str, str]]:
    from mm_jax.checkpoint.hf import abstract_params
    from mm_jax.train.config import read_config

    config = read_config(directory)
    shapes = abstract_params(config.model)
    longest = max(stage.batch.length for stage in config.stages.values())
    lines = [("run", config.name), ("stages", ", ".join(config.stages)), ("dtype", "float32")]
    lines += _parts(shapes)
    if config.model.vision is not None:
        lines.append(("picture", f"{config.model.image_tokens} tokens, whatever its size"))
    return lines + _memory(config.model, shapes, 4, longest)


def _own(directory: str) -> list[tuple[str, str]]:
    from mm_jax.checkpoint.hf import abstract_params
    from mm_jax.checkpoint.own import read_own

    config, length = read_own(directory)
    shapes = abstract_params(config)
    lines = [("family", "none: mm_jax's own format"), ("dtype", config.dtype), *_parts(shapes)]
    return lines + _memory(config, shapes, {"float32": 4, "bfloat16": 2}[config.dtype], length)


def _parts(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str]]:
    counts: Counter[str] = Counter()
    for path, shape in shapes.items():
        counts[path.partition("/")[0]] += math.prod(shape)
    lines = [("parameters", f"{counts.total():,}")]
    return lines + [(f"  {name}", f"{count:,}") for name, count in counts.items()]


def _tokens(opened: Opened, width: int, height: int) -> str:
    import numpy as np

    rule = opened.rule()
    try:
        arrays = rule.images([np.zeros((height, width, 3), np.uint8)])
    except NotImplementedError:
        return "its processor is not implemented yet"
    except UserError as error:
        return f"unknown, because {error}"
    [item] = rule.items("image", arrays, ())
    slots = len(next(iter(item.arrays.values())))
    kind = "patches" if "patches" in item.arrays else "views"
    if opened.system.config.crossed:
        return f"{len(item.index)} token; {item.features} features beside the text"
    return f"{len(item.index)} tokens of {slots} {kind}"


def _memory(
    config: Any, shapes: Mapping[str, tuple[int, ...]], bytes_: int, length: int | None
) -> list[tuple[str, str]]:
    total = sum(map(math.prod, shapes.values()))
    lines = [("memory", f"{_size(total * bytes_)} for the parameters, without activations")]
    if length is not None:
        d = config.decoder
        token = 2 * d.kinds.count("attention") * d.num_kv_heads * d.head_dim * bytes_
        lines.append(("", f"{_size(token * length)} for the cache of one answer of {length} tokens"))
        if d.delta_layers:
            c = d.delta
            state = (
                4 * c.num_value_heads * c.key_dim * c.value_dim + bytes_ * (c.kernel_size - 1) * c.channels
            )
            lines.append(("", f"{_size(len(d.delta_layers) * state)} besides, however long it is"))
        if config.crossed:
            picture = 2 * len(d.cross_layers) * config.image_tokens * d.num_kv_heads * d.head_dim * bytes_
            lines.append(("", f"{_size(picture)} in it for each picture"))
    lines.append(("", f"{_size(total * TRAINING_BYTES)} to train all of it with Adam in float32"))
    return lines


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"
