"""The zoo from flax.nnx: every module wraps with `nnx.bridge.ToNNX` and computes the same."""

import inspect

import flax.linen as nn
import jax
import numpy as np
import pytest
import reference
from flax import nnx

from mm_jax import models
from mm_jax.models import (
    MLP,
    Attention,
    AudioEncoder,
    AudioEncoderConfig,
    BranchProjector,
    Conformer,
    ConformerConfig,
    Context,
    CrossBlock,
    Decoder,
    DecoderConfig,
    DeltaConfig,
    DenseHeads,
    EncoderBlock,
    ExpertConfig,
    Experts,
    GatedDelta,
    HeadConfig,
    HybridConfig,
    HybridEncoder,
    LatentReader,
    MelSubsampling,
    MLPProjector,
    MultimodalConfig,
    MultimodalLM,
    NativeViT,
    NativeViTConfig,
    ProjectorConfig,
    QFormer,
    Resampler,
    SamConfig,
    SamEncoder,
    Texts,
    TiledViT,
    TiledViTConfig,
    VisionTransformer,
    ViTConfig,
)

VIT = ViTConfig(8, 8, 4, embed_dim=8, num_layers=2, num_heads=2, mlp_dim=8)
NATIVE = NativeViTConfig(
    2, 1, 1, embed_dim=8, num_layers=2, num_heads=2, mlp_dim=8, window=2, full_layers=(1,)
)
SAM = SamConfig(
    8, 2, embed_dim=8, num_layers=2, num_heads=2, mlp_dim=8, out_dim=2, window=3, full_layers=(1,)
)
TILED = TiledViTConfig(
    8,
    8,
    4,
    tiles=2,
    shapes=3,
    embed_dim=8,
    num_layers=2,
    num_global_layers=1,
    num_heads=2,
    mlp_dim=8,
    taps=(0,),
)
AUDIO = AudioEncoderConfig(3, 8, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8)
CONFORMER = ConformerConfig(3, 8, MelSubsampling(2, 4), embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8)
DECODER = DecoderConfig(11, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


IDS = np.arange(4, dtype=np.int32)[None]
X, MASK = random(1, 4, 8), np.ones((1, 1, 4, 4), bool)
BATCH = {
    "tokens": IDS,
    "segment_ids": np.ones_like(IDS),
    "positions": IDS,
    "media_index": IDS - 1,
    "pixel_values": random(1, 1, 8, 8, 3),
    "audio_values": random(1, 1, 8, 3),
    "audio_frames": np.array([[5]]),
}
CASES = {
    "MLP": (MLP(6), (X,), None),
    "Attention": (Attention(2, 1, 4), (X,), None),
    "EncoderBlock": (EncoderBlock(2, 8), (X, MASK), None),
    "VisionTransformer": (VisionTransformer(VIT), (BATCH["pixel_values"][0],), None),
    "CrossBlock": (
        CrossBlock(2, 1, 4, 8),
        (X, Context(X[:, :2], np.ones((1, 1, 4, 2), bool), np.ones((1, 4, 1), bool))),
        None,
    ),
    "GatedDelta": (
        GatedDelta(DeltaConfig(1, 2, 4, 4)),
        (X, Texts(IDS // 2, np.ones_like(IDS, bool), np.zeros(1, bool))),
        None,
    ),
    "TiledViT": (
        TiledViT(TILED),
        (random(1, 2, 8, 8, 3), np.ones(1, np.int32), np.ones(1, np.int32)),
        None,
    ),
    "Experts": (Experts(ExpertConfig(3, 2, 4)), (X,), None),
    "NativeViT": (NativeViT(NATIVE), (random(1, 4, 12), IDS // 2, np.stack([IDS, IDS], -1)), None),
    "AudioEncoder": (AudioEncoder(AUDIO), (BATCH["audio_values"][0], np.array([5])), None),
    "Conformer": (Conformer(CONFORMER), (BATCH["audio_values"][0], np.array([5])), None),
    "MLPProjector": (MLPProjector(ProjectorConfig(merge=(2, 1), hidden_dim=4), 6), (X, (2, 2)), None),
    "Resampler": (
        Resampler(ProjectorConfig("resampler", hidden_dim=8, num_queries=2, num_heads=2), 6),
        (X, (2, 2)),
        None,
    ),
    "BranchProjector": (
        BranchProjector(ProjectorConfig("branches", branch_dims=(6, 2)), 6),
        (X, (2, 2)),
        None,
    ),
    "QFormer": (
        QFormer(
            ProjectorConfig("qformer", hidden_dim=8, num_queries=2, num_heads=2, num_layers=2, mlp_dim=8), 6
        ),
        (X, (2, 2)),
        None,
    ),
    "LatentReader": (
        LatentReader(ProjectorConfig("latent", num_queries=2, num_heads=2), 6),
        (X, (2, 2)),
        None,
    ),
    "SamEncoder": (SamEncoder(SAM), (BATCH["pixel_values"][0],), None),
    "HybridEncoder": (
        HybridEncoder(HybridConfig(VIT, SAM)),
        (BATCH["pixel_values"][0], BATCH["pixel_values"][0]),
        None,
    ),
    "DenseHeads": (DenseHeads(HeadConfig(3, 4)), (X,), "image"),
    "Decoder": (Decoder(DECODER), (X, MASK, IDS), "hidden"),
    "MultimodalLM": (
        MultimodalLM(
            MultimodalConfig(
                VIT,
                AUDIO,
                ProjectorConfig(hidden_dim=8),
                ProjectorConfig("linear", (4, 1)),
                DECODER,
            )
        ),
        (BATCH,),
        None,
    ),
}


def test_every_public_module_has_a_case():
    found = {name for name in models.__all__ if inspect.isclass(getattr(models, name))}
    modules = {name for name in found if issubclass(getattr(models, name), nn.Module)}
    assert modules == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_wrapped_in_nnx_it_gives_the_same(name):
    module, inputs, method = CASES[name]
    params = reference.draw(module, *inputs, method=method)
    expected = module.apply({"params": params}, *inputs, method=method)
    wrapped = nnx.bridge.lazy_init(
        nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)), *inputs, **({"method": method} if method else {})
    )
    state = nnx.state(wrapped, nnx.Param)
    assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure(params)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(wrapped, state)
    found = wrapped(*inputs, **({"method": method} if method else {}))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
