"""LLaVA-1.5-7B (Liu et al. 2023): CLIP ViT-L/14 at 336, MLP projector, Llama-2-7B; its two stages."""

from dataclasses import replace
from pathlib import Path
from runpy import run_path

from mm_jax.data.image import ImageRule
from mm_jax.data.pipeline import BatchConfig
from mm_jax.data.processor import ProcessorConfig
from mm_jax.data.sources import SourceConfig
from mm_jax.models import MultimodalConfig, ProjectorConfig, ViTConfig
from mm_jax.train.config import OptimizerConfig, RunConfig, Stage

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def get_config() -> RunConfig:
    llama = run_path(str(Path(__file__).with_name("llama2_7b.py")))["get_config"]()
    vision = ViTConfig(
        height=336, width=336, patch_size=14, embed_dim=1024, num_layers=23, num_heads=16, mlp_dim=4096,
        activation="quick_gelu", norm_eps=1e-5, class_token="drop", patch_bias=False, pre_norm=True, post_norm=False,
    )  # fmt: skip
    projector = ProjectorConfig("mlp", hidden_dim=4096, activation="gelu", norm=False)
    rates = OptimizerConfig(learning_rate=1e-3, warmup_steps=65, weight_decay=0.0, beta2=0.999)
    align = Stage(
        steps=2180,
        mixture={"captions": 1.0},
        trainable=("image_projector",),
        answer_weight="token",
        batch=BatchConfig(rows=256, length=1024, images=1),
        optimizer=rates,
    )
    instruct = replace(
        align,
        steps=5200,
        mixture={"instructions": 1.0},
        trainable=("image_projector", "decoder"),
        batch=BatchConfig(rows=128, length=2048, images=2),
        optimizer=replace(rates, learning_rate=2e-5, warmup_steps=156),
    )
    return replace(
        llama,
        name="llava15_7b",
        model=MultimodalConfig(
            vision, None, image_projector=projector, decoder=llama.model.decoder, dtype="bfloat16"
        ),
        processor=ProcessorConfig(ImageRule(336, 336, mean=MEAN, std=STD, num_tokens=576), None),
        sources={
            "captions": SourceConfig("llava", "data/blip_laion_cc_sbu_558k.json"),
            "instructions": SourceConfig("llava", "data/llava_v1_5_mix665k.json"),
        },
        stages={"align": align, "instruct": instruct},
    )
