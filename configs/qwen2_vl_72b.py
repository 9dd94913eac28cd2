"""Qwen2-VL-72B-Instruct (arXiv 2409.12191): configs/qwen2_vl_7b.py, which has the sources, at its size.

Stage 2 of the paper (section 2.2) trains all parts, the third one all but the tower: "instruct" is the third, and
`--stages.instruct.trainable vision image_projector decoder` makes it the second.
"""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

from mm_jax.train.config import RunConfig


def get_config() -> RunConfig:
    small: RunConfig = run_path(str(Path(__file__).with_name("qwen2_vl_7b.py")))["get_config"]()
    decoder = replace(
        small.model.decoder, embed_dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, mlp_dim=29_568
    )  # of Qwen/Qwen2-VL-72B-Instruct, whose tower is that of the smaller ones
    return replace(
        small,
        name="qwen2_vl_72b",
        init=replace(small.init, checkpoint="checkpoints/Qwen2-VL-72B-Instruct"),
        model=replace(small.model, decoder=decoder),
    )
