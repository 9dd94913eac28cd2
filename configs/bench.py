"""For `bench`: a LLaVA of 102 million parameters, CLIP ViT 12 x 384 at 224/16 and Llama 12 x 640, all of it trained."""

from mm_jax.data.image import ImageRule
from mm_jax.data.pipeline import BatchConfig
from mm_jax.data.processor import ProcessorConfig
from mm_jax.data.sources import SourceConfig
from mm_jax.models import DecoderConfig, MultimodalConfig, ProjectorConfig, ViTConfig
from mm_jax.train.config import OptimizerConfig, RunConfig, Stage


def get_config() -> RunConfig:
    vision = ViTConfig(
        height=224, width=224, patch_size=16, embed_dim=384, num_layers=12, num_heads=6, mlp_dim=1536,
        activation="quick_gelu", norm_eps=1e-5, class_token="drop", patch_bias=False, pre_norm=True, post_norm=False,
    )  # fmt: skip
    decoder = DecoderConfig(
        vocab_size=16_000, embed_dim=640, num_layers=12, num_heads=10, num_kv_heads=10, head_dim=64, mlp_dim=1728,
        tie_embeddings=False,
    )  # fmt: skip
    projector = ProjectorConfig("mlp", hidden_dim=640, activation="gelu", norm=False)
    stage = Stage(
        steps=1000,
        mixture={"chat": 1.0},
        trainable=("vision", "image_projector", "decoder"),
        answer_weight="token",
        batch=BatchConfig(rows=4, length=256, images=1),
        optimizer=OptimizerConfig(learning_rate=1e-4),
    )
    return RunConfig(
        name="bench",
        model=MultimodalConfig(vision, None, image_projector=projector, decoder=decoder),
        processor=ProcessorConfig(ImageRule(224, 224, num_tokens=196), None),
        vocab_size=16_000,
        sources={"chat": SourceConfig("chat", "data/chat.jsonl")},
        stages={"all": stage},
    )
