"""Model FLOPs: the multiplications and additions that the mathematics needs, padding and recomputation excluded."""

from collections.abc import Iterable
from dataclasses import dataclass

from mm_jax.models.conformer import ConformerConfig, MelSubsampling
from mm_jax.models.multimodal import MultimodalConfig
from mm_jax.models.native import JOINED
from mm_jax.models.sam import HybridConfig, SamConfig
from mm_jax.models.tiles import TiledViTConfig
from mm_jax.models.vision import ViTConfig


@dataclass(frozen=True)
class Work:
    """What a batch really holds.

    Attributes:
      tokens: decoder tokens, pseudo-tokens included, padding excluded.
      token_pairs: sum over segments of length * (length + 1) / 2, the causal attention pairs.
      images, clips: used image and audio slots.
      patches: of a native-resolution tower; frame_pairs: sum over its frames of the square of their patches.
    """

    tokens: int
    token_pairs: int
    images: int = 0
    clips: int = 0
    patches: int = 0
    frame_pairs: int = 0


def forward_flops(config: MultimodalConfig, work: Work) -> dict[str, float]:
    """FLOPs of one forward pass by part: vision, image_projector, audio, audio_projector, decoder."""
    flops = {}

    def projector(name: str, features: int, positions: int, tokens: int) -> float:
        p = getattr(config, name)
        width = config.decoder.embed_dim
        merged = features * p.merge[0] * p.merge[1]
        if p.kind == "linear":
            return 2.0 * tokens * merged * width
        if p.kind == "mlp":
            return 2.0 * tokens * p.hidden_dim * (merged + width)
        h = p.hidden_dim
        if p.kind == "branches":
            return 2.0 * tokens * width * (sum(p.branch_dims) / len(p.branch_dims) + width)
        if p.kind == "latent":
            keys = positions + tokens
            return 2.0 * (
                positions * features * width + 2 * width**2 * (tokens + keys) + 2 * tokens * keys * width
            )
        if p.kind == "qformer":
            layer = tokens * (4 * h * h + 2 * tokens * h + 2 * h * p.mlp_dim)
            cross = tokens * (2 * h * h + 2 * positions * h) + positions * 2 * features * h
            return 2.0 * (p.num_layers * layer + p.num_layers // p.cross_every * cross + tokens * h * width)
        reads = positions * (features * h + 2 * h * h)
        return 2.0 * (reads + tokens * (2 * h * h + 2 * positions * h + 4 * h * h + h * width))

    if (v := config.vision) is not None and config.native:
        full = len(v.full_layers) if v.window else v.join_after or v.num_layers
        late = v.num_layers - v.join_after if v.join_after else 0  # layers of a quarter of the patches
        # windows are taken as full, which those at the edge of a picture are not
        pairs = full * work.frame_pairs + (v.num_layers - full - late) * work.patches * v.block
        pairs += late * work.frame_pairs / JOINED**2
        layer = 4 * v.embed_dim**2 + (2 + v.gated) * v.embed_dim * v.mlp_dim
        layers = v.num_layers - late + late / JOINED
        flops["vision"] = 2 * work.patches * (v.patch_dim * v.embed_dim + layers * layer)
        flops["vision"] += 4 * v.embed_dim * pairs
        if v.join_after:
            maps = 4 * v.embed_dim**2 + v.embed_dim * v.mlp_dim * (JOINED + 1) + 2 * v.embed_dim * JOINED
            flops["vision"] += 2 * work.patches * maps
        tokens = work.patches // v.merge**2
        flops["image_projector"] = projector("image_projector", v.feature_dim, work.patches, tokens)
        if config.deep_projector is not None:
            deep = projector("deep_projector", v.feature_dim, work.patches, tokens)
            flops["deep_projector"] = len(v.taps) * deep
    elif isinstance(v, TiledViTConfig):
        embed = 2 * v.tiles * v.height * v.width * 3 * v.embed_dim
        positions, _ = v.feature_grid
        layers = _blocks(v.embed_dim, v.num_layers + v.num_global_layers, v.mlp_dim, positions)
        flops["vision"] = work.images * (embed + layers)
        flops["image_projector"] = work.images * projector(
            "image_projector", v.feature_dim, positions, config.image_tokens
        )
    elif v is not None:
        flops["vision"] = work.images * _tower(v)
        rows, cols = v.feature_grid
        flops["image_projector"] = work.images * projector(
            "image_projector", v.feature_dim, rows * cols, config.image_tokens
        )
    if (a := config.audio) is not None:
        if isinstance(a, ConformerConfig):
            flops["audio"] = work.clips * _conformer(a)
        else:
            positions = a.num_positions * a.pool
            convs = 2 * 3 * a.embed_dim * (a.max_frames * a.num_mels + positions * a.embed_dim)
            flops["audio"] = work.clips * (convs + _blocks(a.embed_dim, a.num_layers, a.mlp_dim, positions))
        flops["audio_projector"] = work.clips * projector(
            "audio_projector", a.feature_dim, a.num_positions, config.audio_tokens
        )
    d = config.decoder
    heads = d.num_heads * d.head_dim
    layer = d.embed_dim * (2 * heads + 2 * d.num_kv_heads * d.head_dim)
    if (e := d.experts) is not None:
        layer += d.embed_dim * (e.num_experts + 3 * e.num_chosen * e.mlp_dim)
    else:
        layer += (2 + d.gated) * d.embed_dim * d.mlp_dim
    ends = d.vocab_size * (d.token_dim or d.embed_dim) + 2 * d.token_dim * d.embed_dim
    own = d.kinds.count("attention")
    per_token = 2 * (own * (layer + d.attention_gate * d.embed_dim * heads) + ends)
    if d.delta_layers:  # the rule for one token after the other, as in `mm_jax.models.delta.gated_delta`
        c, mlp = d.delta, layer - d.embed_dim * (2 * heads + 2 * d.num_kv_heads * d.head_dim)
        values, memory = c.widths["value"], c.num_value_heads * c.key_dim * c.value_dim
        maps = d.embed_dim * (c.channels + 2 * values + 2 * c.num_value_heads) + c.kernel_size * c.channels
        per_token += len(d.delta_layers) * 2 * (mlp + maps + 3 * memory)
    flops["decoder"] = work.tokens * per_token + own * 4 * heads * work.token_pairs
    if work.images and d.cross_layers:  # a token reads one picture; texts without any pass the layers by
        maps, features = 4 * d.embed_dim * d.num_kv_heads * d.head_dim, config.image_tokens
        cross = 2 * d.embed_dim * (2 * heads + (2 + d.gated) * d.mlp_dim) + 4 * heads * features
        flops["decoder"] += len(d.cross_layers) * (work.tokens * cross + work.images * features * maps)
    return flops


def _blocks(width: int, layers: int, mlp: int, positions: int, gated: bool = False) -> float:
    maps = 4 * width**2 + (3 if gated else 2) * width * mlp
    return layers * positions * (2 * maps + 4 * width * positions)


def _tower(v: ViTConfig | SamConfig | HybridConfig) -> float:
    """Of one picture."""
    if isinstance(v, HybridConfig):
        (rows, columns), width = v.low.feature_grid, v.high.out_dim
        halves = (
            2 * 9 * width**2 * rows * columns * (4 * 2 + 2 * 4)
        )  # at half, then a quarter of four times the grid
        return _tower(v.low) + _tower(v.high) + 2 * halves
    if isinstance(v, SamConfig):
        positions, full = v.side**2, len(v.full_layers) if v.window else v.num_layers
        maps = 4 * v.embed_dim**2 + 2 * v.embed_dim * v.mlp_dim
        pairs = full * positions + (v.num_layers - full) * v.window**2  # windows at the edge taken as full
        neck = 2 * positions * (v.embed_dim * v.out_dim + 9 * v.out_dim**2)
        embed = 2 * positions * 3 * v.patch_size**2 * v.embed_dim
        return embed + positions * (2 * v.num_layers * maps + 4 * v.embed_dim * pairs) + neck
    embed, pixels, channels = 0, v.height * v.width, 3
    for wider in v.stem:
        pixels //= 4
        embed += 2 * pixels * 9 * channels * wider
        channels = wider
    embed += 2 * pixels * channels * v.embed_dim
    return embed + _blocks(v.embed_dim, v.num_layers, v.mlp_dim, v.num_positions, v.gated)


def _conformer(a: ConformerConfig) -> float:
    """Of one window. The map of relative places is left out: a batch needs it once, however many clips it has."""
    if isinstance(a.front, MelSubsampling):
        f, frames, bands = a.front, a.max_frames, a.num_mels
        front = 0
        for k in range(f.num_layers):
            frames, bands = (frames + 1) // 2, (bands + 1) // 2
            each = f.kernel_size**2 * f.channels + (f.channels**2 if k else 0)
            front += 2 * frames * bands * each
        width = f.channels * bands
    else:
        frames, width, front = a.max_frames, a.num_mels, 0
        for channels, kernel, stride in zip(a.front.channels, a.front.kernels, a.front.strides, strict=True):
            frames = (frames - kernel) // stride + 1
            front += 2 * frames * kernel * width * channels
            width = channels
    d, t = a.embed_dim, a.num_positions
    maps = 4 * d**2 + 4 * d * a.mlp_dim + 3 * d**2 + a.kernel_size * d
    pairs = 4 * d * t + (2 * d * (2 * t - 1) if a.positions == "relative" else 0)
    return front + 2 * t * width * d + a.num_layers * t * (2 * maps + pairs)


def train_flops(config: MultimodalConfig, work: Work, trainable: Iterable[str]) -> float:
    """FLOPs of one training step on `work` when the top-level parts `trainable` learn.

    A part costs its forward pass once; as much again when its own weights learn, and as much again when a gradient
    flows through it, to something trainable before it or to its own first layers. So the frozen towers of the align
    stage count once, its frozen decoder twice, and every part that learns three times.
    """
    trainable = set(trainable)
    before = {
        "vision": set(),
        "audio": set(),
        "image_projector": {"vision"},
        "deep_projector": {"vision"},
        "audio_projector": {"audio"},
        "decoder": {"vision", "audio", "image_projector", "deep_projector", "audio_projector"},
    }
    forward = forward_flops(config, work)
    return sum(
        flops * (1 + (part in trainable) + bool((before[part] | {part}) & trainable))
        for part, flops in forward.items()
    )
