"""The size of Llama-2-7B, text alone: rows of 2048 tokens from chat JSONL, AdamW, bfloat16 over float32 parameters."""

from mm_jax.data.pipeline import BatchConfig
from mm_jax.data.processor import ProcessorConfig
from mm_jax.data.sources import SourceConfig
from mm_jax.models import DecoderConfig, MultimodalConfig
from mm_jax.train.config import OptimizerConfig, RunConfig, Stage


def get_config() -> RunConfig:
    decoder = DecoderConfig(
        vocab_size=32_000, embed_dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, mlp_dim=11_008,
        norm_eps=1e-5, tie_embeddings=False,
    )  # fmt: skip
    pretrain = Stage(
        steps=10_000,
        mixture={"text": 1.0},
        trainable=("decoder",),
        media=False,
        answer_weight="token",
        batch=BatchConfig(rows=256, length=2048),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=1000, weight_decay=0.1, beta2=0.95),
    )
    return RunConfig(
        name="llama2_7b",
        model=MultimodalConfig(None, None, decoder=decoder, dtype="bfloat16"),
        processor=ProcessorConfig(image=None, audio=None),
        vocab_size=32_000,
        sources={"text": SourceConfig("chat", "data/text.jsonl")},
        stages={"pretrain": pretrain},
        remat="full",
    )
