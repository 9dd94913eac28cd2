"""`convert`: a Hugging Face checkpoint, or a run that began with one, as a directory that transformers loads; other
runs in our own format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm_jax.cli.parser import Parser
from mm_jax.errors import UserError, nearest


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "convert",
        "Read a Hugging Face checkpoint in any spelling of its names, or the newest weights of a run that began\n"
        "with one, and write a directory that transformers loads: weights in safetensors, config.json, tokenizer,\n"
        "template and processor files. A run whose model was put together from parts becomes a LLaVA checkpoint where\n"
        "it is built like one; all others are written in mm_jax's own format, which mm_jax.load reads.",
        "python -m mm_jax convert runs/llava path/to/llava --dtype bfloat16",
    )
    parser.add_argument("source", help="Hugging Face checkpoint, or run directory")
    parser.add_argument("target", help="directory to write")
    parser.add_argument("--dtype", help="float32 or bfloat16 (default: as it is; of a run float32)")
    parser.add_argument("--stage", help="stage of a run (default: the last one that has weights)")
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="largest file of weights (5)"
    )
    options = parser.parse_args(argv)
    source, target = Path(options.source), Path(options.target)
    if options.shard_gb <= 0:
        raise UserError(f"--shard-gb is {options.shard_gb}; more than 0 is needed")
    if source.resolve() == target.resolve():
        raise UserError("source and target are the same directory")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} is not empty")

    import jax
    from tqdm import tqdm

    from mm_jax.checkpoint.export import as_llava, write_llava_files  # after --help: this imports jax
    from mm_jax.checkpoint.hf import FLOATS, is_hf, save_hf
    from mm_jax.checkpoint.own import is_own, save_own
    from mm_jax.lm import load

    if is_own(source):
        raise UserError(f"{source} is in mm_jax's own format, and belongs to no Hugging Face family")
    is_run = not is_hf(source)
    if is_run and not (source / "config.json").is_file():
        raise UserError(
            f"{source} is no Hugging Face checkpoint (it has no config.json with a model_type) and no run either"
        )
    lm = load(source, options.stage, dtype=None if is_run else options.dtype)
    checkpoint, params, why = lm.checkpoint, lm.params, ""
    put_together = checkpoint is None
    if put_together:
        try:
            checkpoint = as_llava(source / "processor", lm.config)
        except UserError as error:
            why = str(error)
    if is_run and options.dtype is not None:
        if options.dtype not in FLOATS:
            raise UserError(f'--dtype is "{options.dtype}"{nearest(options.dtype, FLOATS)}')
        params = jax.tree.map(lambda x: x.astype(options.dtype), params)
    others = [] if checkpoint is None else checkpoint.unused.values()
    total = sum(array.nbytes for array in [*jax.tree.leaves(params), *others])
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {target}") as bar:
        if checkpoint is None:
            save_own(target, lm.config, params, source / "processor", lm.max_length, bar.update)
        else:
            save_hf(target, checkpoint, params, int(options.shard_gb * 10**9), bar.update)
    if checkpoint is None:
        print(f"{target}, in mm_jax's own format: no family of transformers is built like this model ({why})")
        return 0
    if put_together:
        write_llava_files(checkpoint, target)
    print(target)
    return 0
