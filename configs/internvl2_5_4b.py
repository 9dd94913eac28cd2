"""InternVL2.5-4B (Chen et al. 2024, arXiv 2412.05271): InternViT-300M-V2.5, pixel shuffle, an MLP, Qwen2.5-3B-Instruct.

Sources: [stage1], [stage2] internvl2_5_4b_qwen2_5_3b_dynamic_res_stage1.sh and ..._stage2.sh under
internvl_chat/shell/internvl2.5 of https://github.com/OpenGVLab/InternVL, [zero] zero_stage1_config.json there, [hf]
what transformers' Trainer does where they say nothing. The authors pack too, under the same two budgets a row: tokens
and tiles. For fine-tuning the released model on one's own data, take the last stage alone (leave `fresh`, `vision` and
`decoder` out); 2nd_finetune/internvl2_5_4b_dynamic_res_2nd_finetune_full.sh there has its numbers: batches of 128
conversations, --freeze_backbone, max_dynamic_patch 6.

Different here: no drop path ([stage2] --drop_path_rate 0.1), and no random JPEG compression (section 3.2 of the paper).
"""

from dataclasses import replace

from mm_jax.data.pipeline import BatchConfig
from mm_jax.data.sources import SourceConfig
from mm_jax.models import MultimodalConfig
from mm_jax.train.config import InitConfig, OptimizerConfig, RunConfig, Stage


def get_config() -> RunConfig:
    align = Stage(
        steps=100_000,  # [stage1] --max_steps; the paper stops it when the loss is flat
        mixture={"captions": 1.0},
        trainable=("image_projector",),  # [stage1] --freeze_llm, --freeze_backbone
        answer_weight="sqrt",  # [stage1] --loss_reduction square
        # [stage1] 512 devices with one row of --max_packed_tokens 16384 and --num_images_expected 48 tiles
        batch=BatchConfig(rows=512, length=16_384, images=48, bins=20),  # --max_buffer_size 20
        optimizer=OptimizerConfig(
            kind="adamw",  # [zero]
            learning_rate=2e-4,  # [stage1]
            warmup_steps=100,  # [stage1]
            final_fraction=0.0,  # [stage1] cosine, to 0
            weight_decay=0.01,  # [stage1]
            clip_norm=1.0,  # [hf] max_grad_norm
            beta1=0.9,  # [zero] betas
            beta2=0.999,
        ),
    )
    instruct = replace(
        align,
        steps=11_000,  # [stage2] --max_steps, twice through the data
        mixture={"instructions": 1.0},
        trainable=("vision", "image_projector", "decoder"),  # [stage2] nothing is frozen
        optimizer=replace(
            align.optimizer, learning_rate=4e-5, warmup_steps=330
        ),  # [stage2] --warmup_ratio 0.03
    )
    return RunConfig(
        name="internvl2_5_4b",
        init=InitConfig(
            checkpoint="checkpoints/InternVL2_5-4B",
            vision="checkpoints/InternViT-300M-448px-V2_5",
            decoder="checkpoints/Qwen2.5-3B-Instruct",
            fresh=("image_projector",),
        ),
        model=MultimodalConfig(None, None, dtype="bfloat16"),  # --bf16
        processor=None,
        sources={
            "captions": SourceConfig("chat", "data/captions.jsonl"),
            "instructions": SourceConfig("chat", "data/instructions.jsonl"),
        },
        stages={"align": align, "instruct": instruct},
        remat="full",  # --grad_checkpoint
    )
