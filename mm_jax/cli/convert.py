"""`convert`: a Hugging Face checkpoint in another dtype, in other files, or with the names that transformers writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm_jax.cli.parser import Parser
from mm_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "convert",
        "Read a Hugging Face checkpoint in any spelling of its names and write one that transformers loads:\n"
        "weights in safetensors, config.json, tokenizer, template and processor files.",
        "python -m mm_jax convert path/to/llava path/to/copy --dtype bfloat16",
    )
    parser.add_argument("source", help="Hugging Face checkpoint")
    parser.add_argument("target", help="directory to write")
    parser.add_argument("--dtype", help="float32 or bfloat16 (default: as it is)")
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

    from mm_jax.checkpoint.hf import is_hf, load_hf, save_hf  # after --help: this imports jax

    if not is_hf(source):
        raise UserError(f"{source} is no Hugging Face checkpoint: it has no config.json with a model_type")
    checkpoint, params = load_hf(source, options.dtype)
    total = sum(array.nbytes for array in [*jax.tree.leaves(params), *checkpoint.unused.values()])
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {target}") as bar:
        save_hf(target, checkpoint, params, int(options.shard_gb * 10**9), bar.update)
    print(target)
    return 0
