"""Supervised fine-tuning of Qwen2-VL-7B-Instruct (Wang et al. 2024, arXiv 2409.12191) on one's own conversations.

The authors publish no numbers for this. Sources: [factory] examples/train_full/qwen2vl_full_sft.yaml of
https://github.com/hiyouga/LLaMA-Factory, which their README recommends, [hf] what transformers' Trainer does where that
file says nothing, [paper] what moves and what does not.

Pictures keep their size within "min_pixels" and "max_pixels" of the directory's preprocessor_config.json. An image slot
is a patch of 14 x 14 pixels, and four patches make a token.
"""

from mm_jax.data.pipeline import BatchConfig
from mm_jax.data.sources import SourceConfig
from mm_jax.models import DecoderConfig, MultimodalConfig, NativeViTConfig, ProjectorConfig
from mm_jax.train.config import InitConfig, OptimizerConfig, RunConfig, Stage


def get_config() -> RunConfig:
    # the sizes of Qwen/Qwen2-VL-7B-Instruct, for `compile` on a machine that does not have it
    vision = NativeViTConfig(
        patch_size=14, frames=2, merge=2, embed_dim=1280, num_layers=32, num_heads=16, mlp_dim=5120,
        activation="quick_gelu",
    )  # fmt: skip
    merger = ProjectorConfig("mlp", merge=(4, 1), hidden_dim=5120, activation="gelu", norm_each=True)
    decoder = DecoderConfig(
        vocab_size=152_064, embed_dim=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, mlp_dim=18_944,
        tie_embeddings=False, qkv_bias=True, rope_theta=1e6, rope_sections=(16, 24, 24), norm_eps=1e-6,
    )  # fmt: skip
    instruct = Stage(
        steps=1000,  # set it to your data: one step takes some 16 conversations
        mixture={"chat": 1.0},
        # [paper] section 2.2: the tower is frozen in the last stage; [factory] freeze_vision_tower. The merger moves,
        # as the adapter of Qwen-VL does (arXiv 2308.12966, section 3.3). Add "vision" to tune the tower as well.
        trainable=("image_projector", "decoder"),
        answer_weight="token",
        # [factory] 1 x 2 conversations of at most cutoff_len 2048 tokens on each of 8 devices: as many tokens, packed,
        # and patches for three quarters of them
        batch=BatchConfig(rows=8, length=4096, images=12_288),
        optimizer=OptimizerConfig(
            kind="adamw",
            learning_rate=1e-5,  # [factory]
            warmup_steps=100,  # [factory] warmup_ratio 0.1
            final_fraction=0.0,  # [factory] cosine, to 0
            weight_decay=0.0,  # [hf]
            clip_norm=1.0,  # [hf] max_grad_norm
            beta1=0.9,
            beta2=0.999,  # [hf]
        ),
    )
    return RunConfig(
        name="qwen2_vl_7b",
        init=InitConfig(checkpoint="checkpoints/Qwen2-VL-7B-Instruct"),
        model=MultimodalConfig(
            vision, None, image_projector=merger, decoder=decoder, dtype="bfloat16"
        ),  # [factory] bf16
        processor=None,
        sources={"chat": SourceConfig("chat", "data/chat.jsonl")},
        stages={"instruct": instruct},
        remat="full",
    )
