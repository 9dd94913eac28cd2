"""The image encoder of Segment Anything, and the pair of encoders of DeepSeek-VL that it is one half of."""

from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mm_jax.models.attention import ENCODER, attention
from mm_jax.models.execution import Execution
from mm_jax.models.layers import MLP, Activation, Attention, layer_norm
from mm_jax.models.vision import VisionTransformer, ViTConfig


@dataclass(frozen=True)
class SamConfig:
    """Sizes and options of the encoder of Segment Anything; pictures are squares of image_size pixels.

    Attributes:
      out_dim: channels behind the neck.
      norm_eps: of the blocks; the neck has 1e-6.
      positions: whether there is a table of learned positions.
      relative: learned biases of attention by the distance in rows and in columns (Li et al. 2022, MViTv2).
      window: side in patches of the squares that attention stays in, except in `full_layers`; 0: it never does.
    """

    image_size: int = 1024
    patch_size: int = 16
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    out_dim: int = 256
    activation: Activation = "gelu"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    positions: bool = True
    relative: bool = True
    window: int = 14
    full_layers: tuple[int, ...] = (2, 5, 8, 11)

    @property
    def side(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def inputs(self) -> dict[str, tuple[int, int]]:
        """The pictures that it takes: their names in a batch, and (height, width)."""
        return {"pixel_values": (self.image_size, self.image_size)}

    @property
    def feature_grid(self) -> tuple[int, int]:
        """Rows and columns of features that come out."""
        return self.side, self.side

    @property
    def feature_dim(self) -> int:
        """Channels of a feature."""
        return self.out_dim


class SamAttention(nn.Module):
    """Attention over the squares of a map, each on its own, with biases that queries draw from relative positions."""

    config: SamConfig
    side: int
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, side, side, D] -> the same."""
        c, side = self.config, self.side
        head_dim = c.embed_dim // c.num_heads

        def bias(query: jax.Array) -> jax.Array:
            """[N, side * side, heads, head_dim] -> [N, heads, queries, keys]"""
            distance = np.arange(side)[:, None] - np.arange(side)[None] + side - 1
            query = rearrange(query, "n (h w) m c -> n h w m c", h=side)
            init, shape = nn.initializers.normal(0.02), (2 * side - 1, head_dim)
            rows, columns = (
                self.param(f"relative_{axis}", init, shape)[distance].astype(self.dtype)
                for axis in ("rows", "columns")
            )
            by_row = jnp.einsum("nhwmc,hkc->nmhwk", query, rows)
            by_column = jnp.einsum("nhwmc,wkc->nmhwk", query, columns)
            return rearrange(by_row[..., None] + by_column[..., None, :], "n m h w k l -> n m (h w) (k l)")

        def core(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            added = bias(query) if c.relative else None
            return attention(query, key, value, bias=added, execution=self.execution, axes=ENCODER)

        attend = Attention(
            c.num_heads, c.num_heads, head_dim, c.qkv_bias, True, dtype=self.dtype, name="maps"
        )
        y = attend(rearrange(x, "n h w d -> n (h w) d"), core=core)[0]
        return rearrange(y, "n (h w) d -> n h w d", h=side)


class SamBlock(nn.Module):
    """Pre-norm block over a whole map or over its windows.

    A map that the windows do not divide is filled up with zeros, which are attended to like any other place: the
    reference was trained so.
    """

    config: SamConfig
    window: int
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, side, side, D] -> the same."""
        c, side = self.config, x.shape[1]
        window = self.window or side
        y = layer_norm(c.norm_eps, self.dtype, "attention_norm")(x)
        count = -(-side // window)
        more = (0, count * window - side)
        y = rearrange(
            jnp.pad(y, ((0, 0), more, more, (0, 0))), "n (a h) (b w) d -> (n a b) h w d", a=count, b=count
        )
        y = SamAttention(c, window, self.dtype, self.execution, name="attention")(y)
        y = rearrange(y, "(n a b) h w d -> n (a h) (b w) d", a=count, b=count)
        x = x + y[:, :side, :side]
        mlp = MLP(c.mlp_dim, c.activation, dtype=self.dtype, name="mlp")
        return x + mlp(layer_norm(c.norm_eps, self.dtype, "mlp_norm")(x))


class SamNeck(nn.Module):
    """Two convolutions to the width of the output, with a layer norm behind each."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, side, side, D] -> [N, side, side, features]"""
        x = nn.Dense(self.features, use_bias=False, dtype=self.dtype, name="conv1")(x)
        x = layer_norm(1e-6, self.dtype, "norm1")(x)
        x = nn.Conv(self.features, (3, 3), padding=1, use_bias=False, dtype=self.dtype, name="conv2")(x)
        return layer_norm(1e-6, self.dtype, "norm2")(x)


class SamEncoder(nn.Module):
    """ViT with window attention and relative positions (Kirillov et al. 2023; reference: SamVisionModel).

    Blocks are not scanned: the tables of relative positions differ in size between whole maps and windows.
    """

    config: SamConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    def setup(self) -> None:
        c = self.config
        self.patch_embed = nn.Dense(c.embed_dim, dtype=self.dtype)
        if c.positions:
            shape = (c.side, c.side, c.embed_dim)
            self.positions = self.param("positions", nn.initializers.normal(0.02), shape)
        self.layers = [
            SamBlock(c, 0 if k in c.full_layers else c.window, self.dtype, self.execution)
            for k in range(c.num_layers)
        ]
        self.neck = SamNeck(c.out_dim, self.dtype)

    def maps(self, pixel_values: jax.Array, layer: int | None = None) -> tuple[jax.Array, jax.Array | None]:
        """float [N, H, W, 3], normalised -> [N, side, side, out_dim], and the map [N, side, side, D] behind block
        `layer` if one is asked for."""
        p = self.config.patch_size
        x = self.patch_embed(rearrange(pixel_values, "n (h p) (w q) c -> n h w (p q c)", p=p, q=p))
        if self.config.positions:
            x = x + self.positions.astype(self.dtype)
        inner = None
        for k, block in enumerate(self.layers):
            x = self.execution.constrain(block(x), "pictures", None, None, None)
            inner = x if k == layer else inner
        return self.neck(x), inner

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """float [N, H, W, 3], normalised -> [N, side * side, out_dim], row by row."""
        return rearrange(self.maps(pixel_values)[0], "n h w d -> n (h w) d")


@dataclass(frozen=True)
class HybridConfig:
    """Two encoders that look at the same picture in two sizes, and give the same grid of features.

    Attributes:
      low: for the small picture.
      high: for the large one; its map is brought to the grid of the small one.
    """

    low: ViTConfig = field(default_factory=ViTConfig)
    high: SamConfig = field(default_factory=SamConfig)

    @property
    def inputs(self) -> dict[str, tuple[int, int]]:
        """See `SamConfig.inputs`."""
        return self.low.inputs | {"high_res_pixel_values": self.high.inputs["pixel_values"]}

    @property
    def feature_grid(self) -> tuple[int, int]:
        """See `SamConfig.feature_grid`."""
        return self.low.feature_grid

    @property
    def branch_dims(self) -> tuple[int, int]:
        """Channels of the large and of the small picture's features."""
        return 4 * self.high.out_dim, self.low.feature_dim

    @property
    def feature_dim(self) -> int:
        """Channels of a feature."""
        return sum(self.branch_dims)


class HybridEncoder(nn.Module):
    """A ViT and SAM side by side (DeepSeek-VL, section 2.2; reference: DeepseekVLHybridModel).

    The map behind SAM's first block that sees everything goes through a neck of its own and is added to SAM's output
    times a learned factor, which starts at zero; two convolutions of stride 2 bring both to the ViT's grid.
    """

    config: HybridConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, pixel_values: jax.Array, high_res_pixel_values: jax.Array) -> jax.Array:
        """float [N, h, w, 3] and [N, H, W, 3], normalised -> [N, features, feature_dim], the large picture's channels
        first."""
        c = self.config
        low = VisionTransformer(c.low, self.dtype, self.execution, name="low")(pixel_values)
        sam = SamEncoder(c.high, self.dtype, self.execution, name="high")
        last, inner = sam.maps(high_res_pixel_values, c.high.full_layers[0])
        inner = SamNeck(c.high.out_dim, self.dtype, name="neck")(inner)
        halves = [
            nn.Conv(k * c.high.out_dim, (3, 3), (2, 2), 1, use_bias=False, dtype=self.dtype, name=f"half{i}")
            for i, k in enumerate((2, 4))
        ]

        def reduce(x: jax.Array) -> jax.Array:
            rows, columns = c.low.grid
            shape = (len(x), 4 * rows, 4 * columns, x.shape[-1])
            x = jax.image.resize(x, shape, "linear", antialias=False)
            return halves[1](halves[0](x))

        factor = self.param("factor", nn.initializers.zeros_init(), (1,))
        high = reduce(last) + reduce(inner) * factor.astype(self.dtype)
        return jnp.concatenate([rearrange(high, "n h w d -> n (h w) d"), low], axis=-1)
