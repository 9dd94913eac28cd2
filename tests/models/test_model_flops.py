"""Counted FLOPs against XLA's own count of the compiled program, and the multiples of training by example.

XLA also counts what is no product of matrices (norms, softmax, activations, rotations), which the formulas leave out
on purpose. At the widths of these tests that is some five per cent, hence the tolerance; it never is less.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mm_jax.models import (
    AudioEncoder,
    AudioEncoderConfig,
    Conformer,
    ConformerConfig,
    DecoderConfig,
    ExpertConfig,
    HybridConfig,
    HybridEncoder,
    MelSubsampling,
    MultimodalConfig,
    MultimodalLM,
    NativeViTConfig,
    ProjectorConfig,
    SamConfig,
    SamEncoder,
    VisionTransformer,
    ViTConfig,
    WaveformConvolutions,
)
from mm_jax.models.flops import Work, forward_flops, train_flops
from mm_jax.models.projectors import PROJECTORS

ROWS, LENGTH, IMAGES, CLIPS = 2, 64, 2, 2
CONFIG = MultimodalConfig(
    vision=ViTConfig(32, 48, 8, embed_dim=64, num_layers=2, num_heads=4, mlp_dim=256),
    audio=AudioEncoderConfig(80, 48, embed_dim=64, num_layers=2, num_heads=4, mlp_dim=256),
    image_projector=ProjectorConfig("mlp", (2, 2), hidden_dim=128),
    audio_projector=ProjectorConfig("resampler", hidden_dim=64, num_queries=8),
    decoder=DecoderConfig(
        256, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=160
    ),
)
# the compiled program computes every pair of a row, the formula is given them all
WORK = Work(ROWS * LENGTH, ROWS * LENGTH * LENGTH, ROWS * IMAGES, ROWS * CLIPS)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.int32)


def init(module, *inputs, **static):
    """Shapes of the parameters; nothing is computed."""
    call = jax.eval_shape(lambda key, *x: module.init(key, *x, **static), jax.random.key(0), *inputs)
    return call["params"]


def counted(module, *inputs, **static) -> float:
    """XLA's FLOPs of the compiled forward pass; layers are unrolled, or it would count one of them."""
    forward = jax.jit(lambda params, *x: module.apply({"params": params}, *x, **static))
    compiled = forward.lower(init(module, *inputs, **static), *inputs).compile()
    return compiled.cost_analysis()["flops"]


def close(found: float, expected: float) -> bool:
    return 1.0 <= found / expected <= 1.07


def test_encoders():
    flops = forward_flops(CONFIG, WORK)
    assert close(counted(VisionTransformer(CONFIG.vision), floats(4, 32, 48, 3)), flops["vision"])
    stem = replace(CONFIG.vision, stem=(16, 32))
    flops_stem = forward_flops(replace(CONFIG, vision=stem), WORK)["vision"]
    assert close(counted(VisionTransformer(stem), floats(4, 32, 48, 3)), flops_stem)
    assert close(counted(AudioEncoder(CONFIG.audio), floats(4, 48, 80), ints(4)), flops["audio"])


@pytest.mark.parametrize("full", [(0, 1), (1,)])
def test_sam_and_the_pair(full):
    """With windows that divide the map; the ways of maps from one size to another are not counted."""
    high = SamConfig(64, 8, 192, 2, 4, 768, out_dim=64, window=4, full_layers=full, relative=False)
    pair = HybridConfig(ViTConfig(32, 32, 8, embed_dim=64, num_layers=2, num_heads=4, mlp_dim=256), high)
    for config, module, inputs in (
        (high, SamEncoder(high), [floats(4, 64, 64, 3)]),
        (pair, HybridEncoder(pair), [floats(4, 32, 32, 3), floats(4, 64, 64, 3)]),
    ):
        found = forward_flops(replace(CONFIG, vision=config, audio=None), Work(0, 0, images=4))["vision"]
        assert 1.0 <= counted(module, *inputs) / found <= 1.1


def test_conformers():
    sizes = dict(embed_dim=64, num_layers=2, num_heads=4, mlp_dim=256)
    waveform = WaveformConvolutions((32, 32, 32), (10, 3, 2), (5, 2, 2))
    for config, bound in (
        (ConformerConfig(80, 96, MelSubsampling(4, 32), positions="none", **sizes), 1.07),
        # norms and activations are not counted, and over the long maps of the waveform they are more
        (ConformerConfig(1, 1000, waveform, positions="rotary", **sizes), 1.09),
        # the map of places, once a batch, is not counted
        (ConformerConfig(80, 96, MelSubsampling(4, 32), **sizes), 1.12),
    ):
        values = floats(8, config.max_frames, config.num_mels)
        flops = forward_flops(replace(CONFIG, audio=config), Work(0, 0, clips=8))["audio"]
        assert 1.0 <= counted(Conformer(config), values, ints(8)) / flops <= bound


@pytest.mark.parametrize("kind", ["linear", "mlp", "resampler", "qformer", "latent"])
def test_projectors(kind):
    config = ProjectorConfig(kind, (2, 2), hidden_dim=128, num_queries=8, mlp_dim=160)
    whole = MultimodalConfig(CONFIG.vision, None, config, decoder=CONFIG.decoder)
    found = counted(PROJECTORS[kind](config, 64), floats(4, 24, 64), grid=(4, 6))
    assert close(found, forward_flops(whole, Work(0, 0, images=4))["image_projector"])


def batch(config: MultimodalConfig) -> dict:
    arrays = {key: ints(ROWS, LENGTH) for key in ("tokens", "segment_ids", "positions", "media_index")}
    if config.vision is not None:
        arrays["pixel_values"] = floats(ROWS, IMAGES, 32, 48, 3)
    if config.audio is not None:
        arrays["audio_values"] = floats(ROWS, CLIPS, 48, 80)
        arrays["audio_frames"] = ints(ROWS, CLIPS)
    return arrays


def test_decoder():
    config = MultimodalConfig(None, None, decoder=CONFIG.decoder)
    flops = forward_flops(config, WORK)
    assert set(flops) == {"decoder"}
    assert close(counted(MultimodalLM(config), batch(config)), flops["decoder"])


def test_causal_pairs_by_example():
    """A segment of 3 tokens has 6 pairs; each costs 4 operations a head channel and layer: q.k and weight * v."""
    config = MultimodalConfig(None, None, decoder=DecoderConfig(10, 4, 5, 2, 1, 3, 7))
    assert forward_flops(config, Work(0, 6))["decoder"] == 5 * 6 * 4 * (2 * 3)
    query_out, key_value, mlp, head = 2 * 4 * 6, 2 * 4 * 3, 3 * 4 * 7, 4 * 10
    assert forward_flops(config, Work(3, 0))["decoder"] == 3 * 2 * (5 * (query_out + key_value + mlp) + head)


def test_native_tower_by_example():
    """Eight patches in frames of four: maps of every patch, and pairs within frames or windows."""
    tower = NativeViTConfig(
        2, 1, 2, embed_dim=4, num_layers=3, num_heads=1, mlp_dim=6, window=2, full_layers=(1,)
    )
    projector = ProjectorConfig("mlp", (4, 1), hidden_dim=16)
    config = replace(CONFIG, vision=tower, image_projector=projector, audio=None)
    found = forward_flops(config, Work(0, 0, patches=8, frame_pairs=32))
    maps = 12 * 4 + 3 * (4 * 4 * 4 + 2 * 4 * 6)
    assert found["vision"] == 2 * 8 * maps + 4 * 4 * (32 + 2 * 8 * 4)
    assert found["image_projector"] == 2 * 2 * 16 * (16 + 64)


def test_experts_by_example():
    """A token goes through the router and two experts of three matrices each."""
    dense = replace(CONFIG.decoder, mlp_dim=0)
    sparse = replace(dense, experts=ExpertConfig(5, 2, 7))
    costs = [forward_flops(replace(CONFIG, decoder=d), Work(1, 0))["decoder"] for d in (dense, sparse)]
    assert costs[1] - costs[0] == 2 * 2 * 64 * (5 + 3 * 2 * 7)


def test_multiples_of_training_by_example():
    flops = forward_flops(CONFIG, WORK)
    assert all(flops.values()) and len(flops) == 5
    projectors = ("image_projector", "audio_projector")
    for trainable, multiples in (
        # nothing learns; the projectors alone; decoder and projectors; one tower below a frozen decoder; everything
        ((), {}),
        (projectors, {"image_projector": 3, "audio_projector": 3, "decoder": 2}),
        ((*projectors, "decoder"), {"image_projector": 3, "audio_projector": 3, "decoder": 3}),
        (("vision",), {"vision": 3, "image_projector": 2, "decoder": 2}),
        (("decoder",), {"decoder": 3}),
        (tuple(flops), dict.fromkeys(flops, 3)),
    ):
        expected = sum(value * multiples.get(part, 1) for part, value in flops.items())
        assert train_flops(CONFIG, WORK, trainable) == expected
    # the dense stage has no tokens: towers and heads alone
    towers = Work(0, 0, WORK.images, WORK.clips)
    only = forward_flops(CONFIG, towers)
    assert only["decoder"] == 0


@pytest.mark.parametrize(
    "trainable", [("vision",), ("image_projector", "audio_projector"), ("decoder",), None]
)
def test_training_is_what_the_gradient_program_costs(trainable):
    """XLA's count before optimisation (compiling four gradients is slow).

    Wider tolerance: the inputs of a tower's first matrices need no gradient, so "three times" is a little too much
    for a tower of two layers.
    """
    model = MultimodalLM(CONFIG)
    arrays = batch(CONFIG)
    params = init(model, arrays)
    parts = tuple(params) if trainable is None else trainable

    def loss(moving, frozen, arrays):
        return (model.apply({"params": {**frozen, **moving}}, arrays) ** 2).sum()

    moving = {name: params[name] for name in parts}
    frozen = {name: params[name] for name in params if name not in parts}
    found = jax.jit(jax.grad(loss)).lower(moving, frozen, arrays).cost_analysis()["flops"]
    assert 0.97 <= found / train_flops(CONFIG, WORK, parts) <= 1.08
