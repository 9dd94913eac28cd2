"""The decoder-only language model."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mm_jax.models.attention import Mask, as_mask, narrowed
from mm_jax.models.cross import Context, CrossBlock, KeysValues
from mm_jax.models.delta import DeltaConfig, GatedDelta, Memory, Texts
from mm_jax.models.execution import Execution
from mm_jax.models.experts import ExpertConfig, Experts
from mm_jax.models.layers import MLP, NORMS, Activation, Attention, AttentionStart, Norm, sinusoids, stack
from mm_jax.models.quantised import Dense
from mm_jax.models.rotary import RopeScaling, Rotation, channel_axes, log_growth, rotation, text_lengths

Kind = Literal["attention", "cross", "delta"]  # of a layer


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder.

    Attributes:
      num_kv_heads: fewer than num_heads for grouped-query attention.
      gated: MLP with a gate (SwiGLU with silu), or without.
      tie_embeddings: read the logits off the embedding table instead of a separate head.
      token_dim: width of the embedding table where it is not embed_dim; a linear map leads in and one out (OPT-350m).
      embed_scale: factor on the tokens' embeddings (Gemma, Kosmos-2: the root of embed_dim).
      positions: rotary, or added to the embeddings: a learned table, or sines and cosines.
      num_positions: rows of that table; position p takes row p + position_offset.
      rope_scaling: how rotary frequencies are stretched for long texts.
      rope_sections: how many rotary frequencies the time, the row and the column of a position turn (M-RoPE); empty
        for positions along one axis. rope_interleaved: they take turns, see `channel_axes`.
      rotary_dim: channels of a head that are turned, the first ones; 0: all.
      local_theta: base of the rotary embedding, unscaled, in layers with a window (Gemma-3); 0: as in the others.
      log_length: length of the texts that the model was trained on, beyond which queries grow, see
        `mm_jax.models.rotary.log_growth`; 0: they do not.
      windows: for each layer, how many tokens back it looks, itself included; 0 for all. Empty: every layer sees all.
      norm: kind of all norms, see `mm_jax.models.layers.NORMS`.
      norm_place: of the blocks' norms: before attention and MLP ("pre"), after the sum with their input ("post"), or
        before and behind each ("both", Gemma-2).
      inner_norm: one more norm in front of the last map of attention and MLP (Kosmos-2), see `Attention`.
      final_norm: norm after the last block.
      qk_norm: norm on query and key heads (Qwen3), of the kind `norm`.
      query_scale: factor on query x key; None for head_dim ** -0.5.
      attention_cap, logit_cap: bounds of the attention's and of the output's logits (Gemma-2); 0 for none.
      attention_start: first kernels of the attention of a new model, see `Attention`.
      adapter_rank, adapter_scale: low-rank maps for media tokens beside all maps of the blocks, see
        `mm_jax.models.layers.MediaAdapter`; rank 0 for none.
      qkv_bias: biases on query, key and value (Qwen2); out_bias, mlp_bias: on the other projections.
      experts: a mixture of experts in place of the MLP of every layer.
      attention_gate: what attention gives is multiplied with a sigmoid of a map of its input (Qwen3-Next).
      cross_layers: numbers of the layers that read the pictures' features in place of earlier tokens, see
        `mm_jax.models.cross.CrossBlock`. A scan goes over the periods of the pattern that they make.
      delta_layers: numbers of the layers with linear attention in place of attention, and delta: its sizes.
      extra_tokens: that can be read, but not written: rows of the embedding behind those of the vocabulary.
    """

    vocab_size: int = 1024
    embed_dim: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 32
    mlp_dim: int = 512
    activation: Activation = "silu"
    gated: bool = True
    tie_embeddings: bool = True
    token_dim: int = 0
    embed_scale: float = 1.0
    positions: Literal["rotary", "learned", "sines"] = "rotary"
    num_positions: int = 0
    position_offset: int = 0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_sections: tuple[int, ...] = ()
    rope_interleaved: bool = False
    rotary_dim: int = 0
    local_theta: float = 0.0
    log_length: int = 0
    windows: tuple[int, ...] = ()
    norm: Norm = "rms"
    norm_eps: float = 1e-6
    norm_place: Literal["pre", "post", "both"] = "pre"
    inner_norm: bool = False
    final_norm: bool = True
    qk_norm: bool = False
    query_scale: float | None = None
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    attention_start: AttentionStart = "closed"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    experts: ExpertConfig | None = None
    adapter_rank: int = 0
    adapter_scale: float = 1.0
    attention_gate: bool = False
    cross_layers: tuple[int, ...] = ()
    delta_layers: tuple[int, ...] = ()
    delta: DeltaConfig | None = None
    extra_tokens: int = 0

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of the layers."""
        special = dict.fromkeys(self.cross_layers, "cross") | dict.fromkeys(self.delta_layers, "delta")
        return tuple(special.get(k, "attention") for k in range(self.num_layers))

    @property
    def pattern(self) -> tuple[Kind, ...]:
        """The kinds of the layers of one period; each period is like the others."""
        kinds = self.kinds
        lengths = (n for n in range(1, self.num_layers + 1) if self.num_layers % n == 0)
        return next(kinds[:n] for n in lengths if kinds[:n] * (self.num_layers // n) == kinds)


Cache = dict[str, jax.Array]
CONTEXT = ("context_key", "context_value")  # of a cache
# of a cache, for each kind of layer that remembers the text
KEPT: dict[Kind, tuple[str, str]] = {"attention": ("key", "value"), "delta": ("tail", "state")}
# Features [K, B, P, D], or [K, P, D] for all rows, for the first K layers, and int32 [B, T], which of them a position
# takes, -1 for none: DeepStack (Meng et al. 2024).
Deep = tuple[jax.Array, jax.Array]


def init_cache(
    config: DecoderConfig,
    rows: int,
    length: int,
    dtype: jnp.dtype = jnp.float32,
    features: int = 0,
    shares: int = 0,
) -> Cache:
    """An empty KV cache.

    Args:
      features: of a row, for layers that read them; shares: that they have, see `mm_jax.models.cross.Context`.

    Returns:
      key and value [layers, rows, length, kv_heads, head_dim], segment_ids [rows, length]. With cross_layers also what
      those have made of the features, context_key and context_value [cross layers, rows, features, kv_heads, head_dim],
      and seen [rows, shares], what the newest token saw. With delta_layers also their memory, tail and state [delta
      layers, ...], see `mm_jax.models.delta.Memory`: it is of the whole text that has been read, whose earlier stages
      cannot be had back.
    """
    cross, delta = len(config.cross_layers), len(config.delta_layers)
    heads = config.num_kv_heads, config.head_dim
    shape = (config.num_layers - cross - delta, rows, length, *heads)
    cache = {
        "key": jnp.zeros(shape, dtype),
        "value": jnp.zeros(shape, dtype),
        "segment_ids": jnp.zeros((rows, length), jnp.int32),
    }
    if delta:
        memory = jax.tree.map(
            lambda x: jnp.zeros((delta, *x.shape), x.dtype), config.delta.memory(rows, dtype)
        )
        cache |= dict(zip(KEPT["delta"], memory, strict=True))
    if not cross:
        return cache
    context = {name: jnp.zeros((cross, rows, features, *heads), dtype) for name in CONTEXT}
    return cache | context | {"seen": jnp.zeros((rows, shares), jnp.int8)}


class DecoderBlock(nn.Module):
    """Attention and MLP, each added to its input, with norms around (Touvron et al. 2023; see `DecoderConfig`).

    Attributes:
      kind: "delta" for linear attention in place of attention.
    """

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()
    kind: Kind = "attention"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: KeysValues | Memory | None,
        window: jax.Array | None,
        number: jax.Array | None,
        mask: Mask,
        always: jax.Array | None,
        turned: Rotation | None,
        local: Rotation | None,
        starts: jax.Array | None,
        deep: Deep | None,
        media: jax.Array | None,
        growth: jax.Array | None,
        texts: Texts | None,
    ) -> tuple[jax.Array, KeysValues | Memory | None]:
        """[B, T, D] and this layer's cache, window and number -> [B, T, D] and the cache, advanced.

        `local` is the rotation where there is a window; `always` is seen whatever the window.
        """
        c = self.config
        x = self.execution.block_input(x)
        mask = narrowed(mask, window, c.windows, always)
        if local is not None and window is not None:
            turned = jax.tree.map(lambda near, far: jnp.where(window > 0, near, far), local, turned)
        if c.experts is None:
            mlp = MLP(
                c.mlp_dim, c.activation, c.gated, c.mlp_bias, self.dtype, c.inner_norm, c.norm_eps, c.adapter_rank,
                c.adapter_scale, name="mlp",
            )  # fmt: skip
        else:
            mlp = Experts(c.experts, c.activation, self.dtype, name="mlp")

        def norm(name: str, x: jax.Array, here: bool) -> jax.Array:
            return NORMS[c.norm](c.norm_eps, self.dtype, name)(x) if here else x

        after, behind = c.norm_place == "post", c.norm_place == "both"
        y = norm("attention_norm", x, not after)
        if self.kind == "delta":
            y, cache = GatedDelta(c.delta, c.norm_eps, self.dtype, self.execution, name="delta")(
                y, texts, cache
            )
        else:
            attend = Attention(
                c.num_heads, c.num_kv_heads, c.head_dim, c.qkv_bias, c.out_bias, c.qk_norm, c.norm_eps, self.dtype,
                qk_norm_kind=c.norm, inner_norm=c.inner_norm, scale=c.query_scale, cap=c.attention_cap,
                start=c.attention_start, adapter_rank=c.adapter_rank, adapter_scale=c.adapter_scale,
                gate=c.attention_gate, execution=self.execution, name="attention",
            )  # fmt: skip
            y, cache = attend(
                y, mask=mask, turned=turned, cache=cache, starts=starts, media=media, growth=growth
            )
        x = norm("attention_norm", x + norm("attention_out_norm", y, behind), after)
        y = norm("mlp_norm", x, not after)
        y = mlp(y, media) if c.adapter_rank else mlp(y)
        x = norm("mlp_norm", x + norm("mlp_out_norm", y, behind), after)
        x = x if deep is None else _deepened(x, number, deep)
        return self.execution.constrain(x, "batch", "length", None), cache


class DecoderPeriod(nn.Module):
    """One period of a pattern of layers: what a scan repeats where not all layers are of one kind."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: dict[Kind, KeysValues | Memory] | None,
        kept: KeysValues | None,
        window: jax.Array | None,
        number: jax.Array | None,
        context: Context | None,
        *others: object,
    ) -> tuple[jax.Array, tuple[dict[Kind, KeysValues | Memory] | None, KeysValues | None]]:
        """[B, T, D] -> [B, T, D], the advanced cache by kind of layer, and the keys and values of the context.

        Arguments are those of `DecoderBlock`, with a leading axis of this period's layers where it has one for each;
        `kept` are keys and values of the context that were made before. Without a context the layers for it do nothing.
        """
        c = self.config

        def of(tree: object, k: int) -> object:
            return jax.tree.map(lambda a: a[k], tree)

        advanced: dict[Kind, list] = {kind: [] for kind in KEPT if kind in c.pattern}
        made = []
        for k, kind in enumerate(c.pattern):
            if kind != "cross":
                block = DecoderBlock(c, self.dtype, self.execution, kind, name=f"block{k}")
                own = None if cache is None else of(cache[kind], len(advanced[kind]))
                x, own = block(x, own, of(window, k), of(number, k), *others)
                advanced[kind].append(own)
            elif context is not None:
                block = CrossBlock(
                    c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_dim, c.activation, c.norm, c.norm_eps, self.dtype,
                    self.execution, name=f"block{k}",
                )  # fmt: skip
                x, new = block(x, context, of(kept, len(made)))
                made.append(new)

        def together(each: list[KeysValues | Memory]) -> KeysValues | Memory | None:
            return jax.tree.map(lambda *a: jnp.stack(a), *each) if each else None

        if cache is None:  # nothing is kept
            return x, (None, None)
        return x, ({kind: together(each) for kind, each in advanced.items()}, together(made))


def take_features(features: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of features [B, P, D] or, for all rows, [P, D] at int32 [B, T]: [B, T, D]; -1 gives the first."""
    index = jnp.maximum(index, 0)
    if features.ndim == 2:
        return features[index]
    return jnp.take_along_axis(features, index[..., None], axis=1)


def _deepened(x: jax.Array, number: jax.Array, deep: Deep) -> jax.Array:
    """The output of layer `number`, with the features that are meant for it."""
    features, index = deep
    count = len(features)

    def add(x: jax.Array) -> jax.Array:
        taken = take_features(features[jnp.minimum(number, count - 1)], index)
        return x + jnp.where(index[..., None] >= 0, taken, 0).astype(x.dtype)

    return jax.lax.cond(number < count, add, lambda x: x, x)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head, as three methods so that media can be spliced in between."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    def setup(self) -> None:
        c = self.config
        width = c.token_dim or c.embed_dim
        init = nn.initializers.normal(width**-0.5)
        self.embedding = nn.Embed(c.vocab_size + c.extra_tokens, width, dtype=self.dtype, embedding_init=init)
        if c.token_dim:
            self.project_in = nn.Dense(c.embed_dim, use_bias=False, dtype=self.dtype)
            self.project_out = nn.Dense(width, use_bias=False, dtype=self.dtype)
        if c.positions == "learned":
            init = nn.initializers.normal(0.02)
            self.positions = nn.Embed(c.num_positions, c.embed_dim, dtype=self.dtype, embedding_init=init)
        if c.pattern != ("attention",):
            repeats, axes = c.num_layers // len(c.pattern), (0, 0, 0, 0, *[nn.broadcast] * 10)
            layers = stack(DecoderPeriod, repeats, *axes, execution=self.execution)
        else:
            layers = stack(DecoderBlock, c.num_layers, 0, 0, 0, *[nn.broadcast] * 9, execution=self.execution)
        self.layers = layers(c, self.dtype, self.execution)
        if c.final_norm:
            self.norm = NORMS[c.norm](c.norm_eps, self.dtype, None)
        if not c.tie_embeddings:
            self.head = Dense(c.vocab_size, use_bias=False, dtype=self.dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D]."""
        x = self.embedding(tokens) * jnp.asarray(self.config.embed_scale, self.dtype)
        return self.project_in(x) if self.config.token_dim else x

    def hidden(
        self,
        x: jax.Array,
        mask: Mask | jax.Array,
        positions: jax.Array,
        cache: Cache | None = None,
        starts: jax.Array | None = None,
        always: jax.Array | None = None,
        deep: Deep | None = None,
        media: jax.Array | None = None,
        context: Context | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Run the blocks and the final norm.

        Args:
          x: [B, T, D] embeddings with media spliced in.
          mask: over S = T keys or those of the cache, also as bool [B, 1, T, S]; windows narrow it.
          positions: int32 [B, T], or [B, T, 3] where there are rope_sections.
          cache: from `init_cache`; its keys and values are advanced, its segment ids are the caller's.
          starts: int32 [B], see `Attention`.
          always: bool [B, 1, T, S], what is seen besides, whatever the windows.
          deep: media features that the first layers add behind themselves.
          media: bool [B, T], the tokens that the adapters are for; needed where there are some.
          context: what cross_layers read; without it they do nothing. What they make of it is kept in the cache, and
            read from there for a context without features.

        Returns:
          [B, T, D] and the advanced cache.

        Raises ValueError: delta_layers, and a mask without segments.
        """
        c = self.config
        windows = jnp.asarray(c.windows, jnp.int32) if any(c.windows) else None
        slots = jnp.arange(x.shape[1])[None] + (0 if starts is None else starts[:, None])
        mask = as_mask(mask, slots)
        turned = local = None
        if c.positions == "rotary":
            axes = channel_axes(c.rope_sections, c.rope_interleaved) if c.rope_sections else None
            lengths = None
            if c.rope_scaling is not None and c.rope_scaling.kind == "doubling":
                lengths = text_lengths(positions, mask.query_segment_ids)
            channels = c.rotary_dim or c.head_dim
            turned = rotation(positions, channels, c.rope_theta, c.rope_scaling, axes, lengths)
            if c.local_theta:
                local = rotation(positions, channels, c.local_theta)
        else:
            x = x + self._places(positions + c.position_offset)
        growth = log_growth(positions, c.log_length) if c.log_length else None
        number = None if deep is None else jnp.arange(c.num_layers)
        x = self.execution.constrain(x, "batch", "length", None)
        texts = None
        if c.delta_layers:
            if mask.query_segment_ids is None:
                raise ValueError(
                    "layers of the delta rule must know the segments: a Mask with them is needed"
                )
            texts = Texts.of(mask.query_segment_ids, starts)
        others = (mask, always, turned, local, starts, deep, media, growth, texts)
        layers = None
        if c.pattern != ("attention",):
            if cache is not None:
                layers = {
                    kind: tuple(cache[name] for name in KEPT[kind]) for kind in KEPT if kind in c.pattern
                }
            if c.cross_layers and self.is_initializing() and context is None:
                seen = jnp.ones((*x.shape[:2], 1), jnp.int32)
                context = Context.of(seen, 1, jnp.zeros((x.shape[0], 1, c.embed_dim), x.dtype))
            kept = None
            if context is not None and context.features is None:
                kept = tuple(cache[name] for name in CONTEXT)
            apart = partial(rearrange, pattern="(r k) ... -> r k ...", r=c.num_layers // len(c.pattern))
            inputs = jax.tree.map(apart, (layers, kept, windows, number))
            x, made = self.layers(x, *inputs, context, *others)
            layers, made = jax.tree.map(lambda a: rearrange(a, "r k ... -> (r k) ..."), made)
            if made is not None:
                cache = cache | dict(zip(CONTEXT, made, strict=True))
        else:
            if cache is not None:
                layers = tuple(cache[name] for name in KEPT["attention"])
            x, layers = self.layers(x, layers, windows, number, *others)
            layers = {"attention": layers}
        if cache is not None:
            for kind, arrays in layers.items():
                cache = cache | dict(zip(KEPT[kind], arrays, strict=True))
        return self.norm(x) if c.final_norm else x, cache

    def _places(self, rows: jax.Array) -> jax.Array:
        """int32 [B, T] -> [B, T, D], what is added to the embeddings."""
        c = self.config
        if c.positions == "learned":
            return self.positions(rows)
        return jnp.asarray(sinusoids(c.num_positions, c.embed_dim), self.dtype)[rows]

    def logits(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> float32 [B, T, vocab]."""
        c = self.config
        x = self.project_out(x) if c.token_dim else x
        out = self.embedding.attend(x) if c.tie_embeddings else self.head(x)
        out = self.execution.constrain(out.astype(jnp.float32), "batch", "length", "vocab")
        return c.logit_cap * jnp.tanh(out / c.logit_cap) if c.logit_cap else out
