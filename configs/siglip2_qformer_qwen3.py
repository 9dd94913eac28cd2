"""A combination of one's own: SigLIP2 so400m at 384, a Q-Former of 64 queries, Qwen3-1.7B.

Nobody has published it, so the numbers are borrowed: the schedule is that of configs/llava_1_5_7b.py, which has the
sources, but for [blip2] the sizes of the Q-Former and the learning rate of its first stage here, which are BLIP-2's
(arXiv 2301.12597, sections 3.1 and 3.4): a Q-Former from nothing does not bear the 1e-3 of an MLP.
"""

from dataclasses import replace

from mm_jax.data.pipeline import BatchConfig
from mm_jax.data.sources import SourceConfig
from mm_jax.models import MultimodalConfig, ProjectorConfig
from mm_jax.train.config import InitConfig, OptimizerConfig, RunConfig, Stage


def get_config() -> RunConfig:
    projector = ProjectorConfig(
        "qformer", hidden_dim=768, num_queries=64, num_heads=12, num_layers=12, mlp_dim=3072, cross_every=2,
        activation="gelu", norm_eps=1e-12,
    )  # fmt: skip
    align = Stage(
        steps=2181,
        mixture={"captions": 1.0},
        trainable=("image_projector",),
        answer_weight="token",
        batch=BatchConfig(rows=32, length=1024, images=8),  # 256 captions
        optimizer=OptimizerConfig(
            learning_rate=1e-4,  # [blip2]
            warmup_steps=66,
            final_fraction=0.0,
            weight_decay=0.05,  # [blip2]
            beta2=0.98,  # [blip2]
        ),
    )
    instruct = replace(
        align,
        steps=5198,
        mixture={"instructions": 1.0},
        trainable=("image_projector", "decoder"),
        batch=BatchConfig(rows=32, length=2048, images=4),  # some 128 conversations
        optimizer=replace(
            align.optimizer, learning_rate=2e-5, warmup_steps=156, weight_decay=0.0, beta2=0.999
        ),
    )
    return RunConfig(
        name="siglip2_qformer_qwen3",
        init=InitConfig(vision="checkpoints/siglip2-so400m-patch14-384", decoder="checkpoints/Qwen3-1.7B"),
        model=MultimodalConfig(None, None, image_projector=projector, dtype="bfloat16"),
        processor=None,
        sources={
            "captions": SourceConfig("llava", "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"),
            "instructions": SourceConfig("llava", "data/llava_v1_5_mix665k.json"),
        },
        stages={"align": align, "instruct": instruct},
        remat="full",
    )
