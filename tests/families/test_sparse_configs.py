"""Configs in the manner of released files, which leave out what equals a default and repeat settings of generation."""

import pytest

from mm_jax.checkpoint.hf import abstract_params
from mm_jax.families import FAMILIES
from mm_jax.models import DecoderConfig

OLD = dict(top_k=50, temperature=1.0, diversity_penalty=0.0, max_length=20, pruned_heads={}, bad_words_ids=None,
           add_cross_attention=False, torchscript=False, typical_p=1.0)  # fmt: skip
CONFIGS = {
    "blip-2": {
        "image_token_index": 50_265,
        "num_query_tokens": 32,
        "qformer_config": OLD | {"model_type": "blip_2_qformer", "classifier_dropout": None},
        "text_config": OLD
        | {"model_type": "opt", "hidden_size": 2560, "ffn_dim": 10_240, "num_hidden_layers": 32,
           "num_attention_heads": 32, "word_embed_proj_dim": 2560, "activation_dropout": 0.0, "init_std": 0.02,
           "prefix": "</s>", "vocab_size": 50_304},
        "vision_config": OLD | {"model_type": "blip_2_vision_model", "dropout": 0.0},
        "use_decoder_only_language_model": True,
    },
    "instructblip": {
        "qformer_config": OLD | {"vocab_size": 30_523},
        "text_config": OLD | {"model_type": "llama", "vocab_size": 32_001, "intermediate_size": 11_008},
        "vision_config": OLD,
    },
    "kosmos-2": {
        "text_config": OLD | {"scale_embedding": True, "layerdrop": 0.0},
        "vision_config": OLD | {"dropout": 0.0},
    },
    "gemma3": {
        "boi_token_index": 255_999,
        "mm_tokens_per_image": 256,
        "eos_token_id": [1, 106],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240,
                        "num_hidden_layers": 34, "sliding_window": 1024,
                        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_attention_heads": 16,
                          "model_type": "siglip_vision_model", "num_hidden_layers": 27, "patch_size": 14,
                          "vision_use_head": False},
    },
    "paligemma": {
        "image_token_index": 257_152,
        "projection_dim": 2048,
        "text_config": {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16_384,
                        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
                        "num_image_tokens": 256, "vocab_size": 257_216},
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
                          "num_hidden_layers": 27, "num_image_tokens": 256, "patch_size": 14, "projection_dim": 2048,
                          "projector_hidden_act": "gelu_fast", "vision_use_head": False},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_read(kind):
    system = FAMILIES[kind].system(CONFIGS[kind] | {"model_type": kind}, frozenset())
    paths = [weight.path for weight in system.weights]
    assert len(paths) == len(set(paths)) and set(paths) == set(abstract_params(system.config))


def decoder(kind: str) -> DecoderConfig:
    return FAMILIES[kind].system(CONFIGS[kind] | {"model_type": kind}, frozenset()).config.decoder


def test_what_they_say():
    assert decoder("blip-2").token_dim == 0 and decoder("blip-2").num_positions == 2050
    gemma = decoder("gemma3")
    assert gemma.windows[:7] == (1024,) * 5 + (0, 1024) and gemma.rope_scaling.factor == 8.0
    assert (gemma.rope_theta, gemma.local_theta, gemma.query_scale) == (1e6, 1e4, 1 / 16)
    assert decoder("paligemma").embed_scale == 2048**0.5
    kosmos = FAMILIES["kosmos-2"].system(CONFIGS["kosmos-2"], frozenset()).config
    assert kosmos.image_tokens == 64 and kosmos.vision.num_positions == 257
