"""InternVL2.5-26B (Chen et al. 2024, arXiv 2412.05271): InternViT-6B-V2.5, pixel shuffle, an MLP, InternLM2.5-20B-Chat.

As configs/internvl2_5_4b.py, which has the sources, with the scripts internvl2_5_26b_internlm2_5_20b_dynamic_res_
stage1.sh, ..._stage1_5.sh and ..._stage2.sh. Nothing on disk is needed to `compile` it: the sizes are those of
OpenGVLab/InternVL2_5-26B.
"""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

from mm_jax.models import DecoderConfig, MultimodalConfig, ProjectorConfig, ViTConfig
from mm_jax.train.config import RunConfig


def get_config() -> RunConfig:
    small: RunConfig = run_path(str(Path(__file__).with_name("internvl2_5_4b.py")))["get_config"]()
    vision = ViTConfig(
        height=448, width=448, patch_size=14, embed_dim=3200, num_layers=45, num_heads=25, mlp_dim=12_800,
        activation="gelu", norm="rms", class_token="drop", post_norm=False, qkv_bias=False, qk_norm=True,
        layer_scale=0.1,
    )  # fmt: skip
    projector = ProjectorConfig(
        "mlp", (2, 2), hidden_dim=6144, activation="gelu", norm_eps=1e-5, order="rows"
    )
    decoder = DecoderConfig(
        vocab_size=92_553, embed_dim=6144, num_layers=48, num_heads=48, num_kv_heads=8, head_dim=128, mlp_dim=16_384,
        tie_embeddings=False, rope_theta=1e6, norm_eps=1e-5,
    )  # fmt: skip
    align, instruct = (
        replace(stage, optimizer=replace(stage.optimizer, weight_decay=0.05))
        for stage in small.stages.values()
    )
    adapt = replace(  # [stage1_5]: the tower learns too, two rows a device
        align,
        trainable=("vision", "image_projector"),
        batch=replace(align.batch, accumulate=2),
        optimizer=replace(align.optimizer, learning_rate=1e-5),
    )
    instruct = replace(
        instruct, steps=5500, optimizer=replace(instruct.optimizer, learning_rate=2e-5, warmup_steps=165)
    )
    return replace(
        small,
        name="internvl2_5_26b",
        init=replace(
            small.init,
            checkpoint="checkpoints/InternVL2_5-26B",
            vision="checkpoints/InternViT-6B-448px-V1-5",
            decoder="checkpoints/internlm2_5-20b-chat",
        ),
        model=MultimodalConfig(vision, None, image_projector=projector, decoder=decoder, dtype="bfloat16"),
        stages={"align": align, "adapt": adapt, "instruct": instruct},
    )
