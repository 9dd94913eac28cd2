"""Building blocks shared by encoders, projectors and the decoder."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from mm_jax.models.attention import DECODER, ENCODER, Axes, Mask, attention, attention_weights, write_slots
from mm_jax.models.execution import Execution
from mm_jax.models.quantised import Dense
from mm_jax.models.rotary import Rotation, rotate

UNROLLED_ON_CPU = 8  # layers

# What a branch adds to the residual stream starts at zero, so a new model begins as the identity and its first steps
# do not drown the embeddings (Zhang et al. 2019, Fixup; the quickstart learns faster from it).
OPEN, CLOSED = nn.initializers.lecun_normal(), nn.initializers.zeros_init()

AttentionStart = Literal["closed", "open", "mimetic"]

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
    "silu": nn.silu,
    "relu": nn.relu,
}


def layer_norm(eps: float, dtype: jnp.dtype, name: str | None, affine: bool = True) -> nn.LayerNorm:
    """Layer norm with the variance taken around the mean; affine: with learned factors and biases.

    Flax's default, mean(x^2) - mean(x)^2, loses digits on the large channels that trained towers have.
    """
    return nn.LayerNorm(
        eps, dtype=dtype, use_bias=affine, use_scale=affine, use_fast_variance=False, name=name
    )


def rms_norm(eps: float, dtype: jnp.dtype, name: str | None) -> nn.RMSNorm:
    """RMS norm (Zhang and Sennrich 2019)."""
    return nn.RMSNorm(eps, dtype=dtype, name=name)


class CentredRMSNorm(nn.Module):
    """RMS norm whose parameter is added to 1 to give the factor, so that weight decay pulls to 1 (Gemma)."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]; computed in float32."""
        scale = self.param("scale", nn.initializers.zeros_init(), x.shape[-1:])
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * inverse * (1 + scale.astype(jnp.float32))).astype(self.dtype)


Norm = Literal["layer", "layer_plain", "rms", "rms_centred"]

NORMS: dict[Norm, Callable[[float, jnp.dtype, str | None], nn.Module]] = {
    "layer": layer_norm,
    "layer_plain": partial(layer_norm, affine=False),
    "rms": rms_norm,
    "rms_centred": lambda eps, dtype, name: CentredRMSNorm(eps, dtype, name=name),
}


def sinusoids(length: int, channels: int) -> np.ndarray:
    """Positions of tensor2tensor, fairseq and Whisper: float32 [length, channels], sines in the first half, cosines in
    the second."""
    scales = np.exp(-np.log(10_000.0) / (channels // 2 - 1) * np.arange(channels // 2))
    angles = np.arange(length)[:, None] * scales[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_2d(grid: tuple[int, int], channels: int) -> np.ndarray:
    """2-D sine-cosine table (He et al. 2022, MAE): float32 [rows * cols, channels], columns first half, rows second."""
    places = np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), axis=1)
    return sincos_of(places, channels, np).astype(np.float32)


def sincos_of(places: jax.Array, channels: int, xp: ModuleType = jnp) -> jax.Array:
    """Rows of `sincos_2d` for places int [..., 2] (row, column) of any grid: float [..., channels]; `xp` computes."""
    frequencies = 10_000.0 ** (-np.arange(channels // 4) / (channels // 4))
    frequencies = frequencies.astype(np.float32) if xp is jnp else frequencies
    angles = places[..., ::-1, None] * frequencies  # the column first
    both = xp.concatenate([xp.sin(angles), xp.cos(angles)], axis=-1)
    return both.reshape(*places.shape[:-1], channels)


class MediaAdapter(nn.Module):
    """What media tokens, and no others, get on top of linear maps: scale * B A x (Dong et al. 2024, "Partial LoRA").

    Maps of the same input share A.
    """

    rank: int
    scale: float = 1.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, media: jax.Array, **features: int) -> dict[str, jax.Array]:
        """[B, T, D], bool [B, T] and the width of each map -> what is added to its output, [B, T, width]."""
        low = nn.Dense(self.rank, use_bias=False, dtype=self.dtype, name="first")(x)
        low = jnp.where(media[..., None], low * jnp.asarray(self.scale, self.dtype), 0)

        def up(name: str, width: int) -> jax.Array:
            return nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=CLOSED, name=name)(low)

        return {name: up(name, width) for name, width in features.items()}


def mimetic_kernels(
    key: jax.Array, features: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> dict[str, jax.Array]:
    """First kernels with which a token looks at the tokens that are like it and takes over what they are.

    Queries equal keys, and the way out is the way in of the values turned round, after Trockman and Kolter 2023
    (Mimetic initialization of self-attention layers), who find products of this kind in trained models. With random
    kernels a small decoder takes thousands of pictures to start matching a question's words with the features that
    carry the same; with these, hundreds.

    Returns:
      query [D, N * H], key and value [D, K * H], out [N * H, D].
    """
    keys = jax.random.split(key)
    narrow = [OPEN(k, (features, num_kv_heads * head_dim), jnp.float32) for k in keys]
    groups = num_heads // num_kv_heads
    wide = [repeat(kernel, "d (k h) -> d (k g h)", k=num_kv_heads, g=groups) for kernel in narrow]
    return {"query": wide[0], "key": narrow[0], "value": narrow[1], "out": wide[1].T}


class Attention(nn.Module):
    """Multi-head attention over `x`, or from `x` to `context`, with optional rotary positions and KV cache.

    Attributes:
      num_heads, num_kv_heads, head_dim: grouped-query attention when num_kv_heads < num_heads.
      use_bias: biases on the query, key and value projections.
      key_bias, out_bias: bias on the key and out projections; None for the same as use_bias.
      qk_norm: RMS norm on queries and keys before the rotation, of the kind qk_norm_kind.
      norm_heads: "each" head is normalised on its own (Qwen3), or "all" heads of a token together (InternViT).
      inner_norm: layer norm between the heads and the out projection (Wang et al. 2022, Magneto: sub-LN).
      scale, cap: as of `mm_jax.models.attention.attention`.
      start: the first kernels: "closed" adds nothing to the residual stream, see CLOSED; "open" is for what something
        else closes, as both could not learn; "mimetic" looks at what is
        alike and passes it on, see `mimetic_kernels`; for self-attention.
      adapter_rank, adapter_scale: of the `MediaAdapter`s of all four maps; rank 0 for none.
      gate: the result is multiplied with a sigmoid of one more map of `x` (Qwen3-Next).
      dtype: compute dtype; parameters stay float32.
      axes: logical names of the activations' axes.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    use_bias: bool = True
    out_bias: bool | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    norm_heads: Literal["each", "all"] = "each"
    qk_norm_kind: Norm = "rms"
    inner_norm: bool = False
    scale: float | None = None
    cap: float = 0.0
    start: AttentionStart = "closed"
    adapter_rank: int = 0
    adapter_scale: float = 1.0
    key_bias: bool | None = None
    gate: bool = False
    execution: Execution = Execution()
    axes: Axes = DECODER

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        mask: Mask | jax.Array | None = None,
        turned: Rotation | None = None,
        cache: tuple[jax.Array, jax.Array] | None = None,
        starts: jax.Array | None = None,
        key_places: jax.Array | None = None,
        core: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
        media: jax.Array | None = None,
        growth: jax.Array | None = None,
        kept: tuple[jax.Array, jax.Array] | None = None,
        keep: bool = False,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Attend.

        Args:
          x: [B, T, D].
          context: [B, S, C] to attend to; None for self-attention.
          mask: who may look at whom, over S keys (S = cache length when a cache is given).
          turned: from `rotation`, for rotary positions.
          cache: keys and values [B, L, K, H] seen so far; the new ones are written at slots
            `starts[b] .. starts[b] + T - 1` and attention reads the whole cache.
          starts: int32 [B].
          key_places: [S, C] or [B, S, C] added to the context for the keys alone, so that a query can look for a place.
          core: takes query, key and value to their result in place of `attention` under `mask`.
          media: bool [B, T], the tokens that the adapters are for.
          growth: float [B, T], factors on the queries.
          kept: keys and values [B, S, K, H] of a context that were made before, in its place.
          keep: give out the keys and values of the context.

        Returns:
          [B, T, D] and the updated cache, or what is to be kept (None when neither was asked for).
        """

        first = {} if self.start == "open" else {"out": CLOSED}
        if self.start == "mimetic" and self.is_initializing():
            shape = (x.shape[-1], self.num_heads, self.num_kv_heads, self.head_dim)
            kernels = mimetic_kernels(self.make_rng("params"), *shape)
            first = {name: lambda *_, kernel=kernel: kernel for name, kernel in kernels.items()}

        def dense(name: str, features: int, use_bias: bool) -> Dense:
            kernel_init = first.get(name, OPEN)
            return Dense(features, use_bias=use_bias, dtype=self.dtype, kernel_init=kernel_init, name=name)

        def adapted(name: str, x: jax.Array, **features: int) -> dict[str, jax.Array]:
            if not self.adapter_rank:
                return {}
            adapter = MediaAdapter(self.adapter_rank, self.adapter_scale, self.dtype, name=f"{name}_adapter")
            return adapter(x, media, **features)

        own, shared = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        added = adapted("qkv", x, query=own, key=shared, value=shared)

        def project(name: str, inputs: jax.Array, heads: int, bias: bool = self.use_bias) -> jax.Array:
            out = dense(name, heads * self.head_dim, bias)(inputs)
            out = out + added[name] if added else out
            normed = self.qk_norm and name != "value"
            if normed and self.norm_heads == "all":
                out = NORMS[self.qk_norm_kind](self.norm_eps, self.dtype, f"{name}_norm")(out)
            out = rearrange(out, "b t (n h) -> b t n h", n=heads)
            if normed and self.norm_heads == "each":
                out = NORMS[self.qk_norm_kind](self.norm_eps, self.dtype, f"{name}_norm")(out)
            return out

        query = project("query", x, self.num_heads)
        if kept is None:
            context = x if context is None else context
            key_bias = self.use_bias if self.key_bias is None else self.key_bias
            key = context if key_places is None else context + key_places
            key = project("key", key, self.num_kv_heads, key_bias)
            value = project("value", context, self.num_kv_heads)
        else:
            key, value = (array.astype(self.dtype) for array in kept)
        if turned is not None:
            query, key = rotate(query, turned), rotate(key, turned)
        if growth is not None:
            query = query * growth[..., None, None].astype(self.dtype)
        if cache is not None:
            key = write_slots(cache[0], key, starts)
            value = write_slots(cache[1], value, starts)
            cache = key, value
        elif keep:
            cache = key, value
        if self.is_mutable_collection("intermediates"):
            weights = attention_weights(query, key, mask, self.scale, self.cap)
            self.sow("intermediates", "attention_weights", weights)
        if core is None:
            out = attention(
                query, key, value, mask, self.scale, self.cap, execution=self.execution, axes=self.axes
            )
        else:
            out = core(query, key, value)
        out = rearrange(out, "b t n h -> b t (n h)")
        if self.gate:
            out = out * nn.sigmoid(dense("gate", own, self.use_bias)(x))
        if self.inner_norm:
            out = layer_norm(self.norm_eps, self.dtype, "inner_norm")(out)
        out_bias = self.use_bias if self.out_bias is None else self.out_bias
        added = adapted("out", out, out=x.shape[-1])
        out = dense("out", x.shape[-1], out_bias)(out)
        return out + added["out"] if added else out, cache


class MLP(nn.Module):
    """Two-layer perceptron, or its gated form `down(act(gate x) * up x)` (SwiGLU with silu; Shazeer 2020).

    Attributes:
      inner_norm: layer norm in front of the second map, see `Attention`.
      adapter_rank, adapter_scale: of the `MediaAdapter`s of all maps; rank 0 for none.
      start: "closed" or "open", see `Attention`.
    """

    mlp_dim: int
    activation: Activation = "gelu_tanh"
    gated: bool = False
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    inner_norm: bool = False
    norm_eps: float = 1e-6
    adapter_rank: int = 0
    adapter_scale: float = 1.0
    start: Literal["closed", "open"] = "closed"

    @nn.compact
    def __call__(self, x: jax.Array, media: jax.Array | None = None) -> jax.Array:
        """[..., D] -> [..., D]; media: bool [...], the tokens that the adapters are for."""

        def dense(
            name: str, x: jax.Array, features: int, init: nn.initializers.Initializer = OPEN
        ) -> jax.Array:
            out = Dense(features, use_bias=self.use_bias, dtype=self.dtype, kernel_init=init, name=name)(x)
            if not self.adapter_rank:
                return out
            adapter = MediaAdapter(self.adapter_rank, self.adapter_scale, self.dtype, name=f"{name}_adapter")
            return out + adapter(x, media, **{name: features})[name]

        hidden = dense("up", x, self.mlp_dim)
        activate = ACTIVATIONS[self.activation]
        hidden = activate(dense("gate", x, self.mlp_dim)) * hidden if self.gated else activate(hidden)
        if self.inner_norm:
            hidden = layer_norm(self.norm_eps, self.dtype, "inner_norm")(hidden)
        return dense("down", hidden, x.shape[-1], CLOSED if self.start == "closed" else OPEN)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block with full attention, the block of ViT and Whisper encoders.

    Attributes:
      collect: give the output a second time, for `nn.scan` to collect those of all layers.
      norm: kind of the two norms.
      qkv_bias: biases on query, key and value; the other maps always have them.
      qk_norm: RMS norm on queries and keys, over all heads of a token together.
      layer_scale: a learned factor on each channel of what the two branches add (Touvron et al. 2021, CaiT), and its
        first value; None for no factors.
      key_bias: bias on the key (Whisper has none); None for the same as qkv_bias.
      gated: the MLP is gated.
      out_bias: bias on the map behind the heads.
      branch_gate: of a learned number whose tanh is a factor on what each branch adds (Alayrac et al. 2022, Flamingo),
        the first value; None for no such number.
    """

    num_heads: int
    mlp_dim: int
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    collect: bool = False
    norm: Norm = "layer"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    key_bias: bool | None = None
    gated: bool = False
    out_bias: bool = True
    branch_gate: float | None = None
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, mask: Mask | jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """[B, T, D] -> [B, T, D] and what `nn.scan` collects."""
        x = self.execution.block_input(x)

        def norm(name: str) -> nn.Module:
            return NORMS[self.norm](self.norm_eps, self.dtype, name)

        def scaled(name: str, branch: jax.Array) -> jax.Array:
            if self.branch_gate is not None:
                number = self.param(f"{name}_gate", nn.initializers.constant(self.branch_gate), (1,))
                branch = branch * jnp.tanh(number).astype(self.dtype)
            if self.layer_scale is None:
                return branch
            scale = self.param(f"{name}_scale", nn.initializers.constant(self.layer_scale), branch.shape[-1:])
            return branch * scale.astype(self.dtype)

        heads = self.num_heads
        attend = Attention(
            heads, heads, x.shape[-1] // heads, self.qkv_bias, self.out_bias, self.qk_norm, self.norm_eps, self.dtype,
            "all", key_bias=self.key_bias, execution=self.execution, axes=ENCODER, name="attention",
        )  # fmt: skip
        x = x + scaled("attention", attend(norm("attention_norm")(x), mask=mask)[0])
        mlp = MLP(self.mlp_dim, self.activation, self.gated, dtype=self.dtype, name="mlp")
        x = x + scaled("mlp", mlp(norm("mlp_norm")(x)))
        x = self.execution.constrain(x, "pictures", None, None)
        return x, x if self.collect else None


def stack(
    block: type[nn.Module], length: int, *in_axes: object, execution: Execution = Execution()
) -> type[nn.Module]:
    """`block` repeated `length` times by scan: one compiled body, parameters with a leading [length] axis.

    On the CPU a short stack is unrolled in the program: training steps of the quickstart take a sixth less time
    when XLA need not carry every layer's activations through a loop. `execution` says what the backward pass keeps.
    """
    unroll = length <= UNROLLED_ON_CPU and execution.platform == "cpu"
    return nn.scan(
        execution.rematerialised(block),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        unroll=length if unroll else 1,
    )
