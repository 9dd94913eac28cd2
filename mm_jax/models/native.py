"""The image encoder for pictures and videos of any size and shape."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mm_jax.models.attention import NATIVE, attention, row_mask
from mm_jax.models.execution import Execution
from mm_jax.models.layers import MLP, NORMS, Activation, Attention, Norm, stack
from mm_jax.models.rotary import Rotation, axial_rotation


@dataclass(frozen=True)
class NativeViTConfig:
    """Sizes and options of a native-resolution Vision Transformer.

    Attributes:
      patch_size: pixels of a patch's side; frames: pictures that one patch spans in time.
      merge: the patches of a merge x merge square stand next to each other, for the projector to join them.
      gated: MLP with a gate.
      norm: of the blocks.
      table_side: a learned table of table_side x table_side positions, stretched over each picture (Qwen3-VL); 0: none.
      smooth_table: it is stretched with antialiasing, along rows and columns apart (SigLIP2 NaFlex), and patches are
        rows, columns, channels.
      window: side in patches of the squares that attention stays in, except in `full_layers`; 0: it sees the whole
        frame in every layer.
      rope_theta: base of the rotary positions; 0 for none.
      post_norm: a norm after the last block; taps are taken before it.
      slot_patches: patches of a slot, where each picture has a slot of its own; 0: they follow each other in a row.
      join_after: behind so many blocks every four patches, which stand next to each other, become one, see
        `JoinedPatches`; 0: nowhere. Not together with windows, rotary positions or taps.
      taps: give out the hidden states after these blocks too (0 is the first block), for the decoder's first layers.
    """

    patch_size: int = 14
    frames: int = 2
    merge: int = 2
    embed_dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    mlp_dim: int = 512
    activation: Activation = "quick_gelu"
    gated: bool = False
    norm: Norm = "layer"
    norm_eps: float = 1e-6
    patch_bias: bool = False
    rope_theta: float = 10_000.0
    table_side: int = 0
    smooth_table: bool = False
    window: int = 0
    full_layers: tuple[int, ...] = ()
    taps: tuple[int, ...] = ()
    post_norm: bool = False
    slot_patches: int = 0
    join_after: int = 0

    @property
    def patch_dim(self) -> int:
        """Values of a patch: channels x frames x rows x columns, in this order without a smooth_table."""
        return 3 * self.frames * self.patch_size**2

    @property
    def feature_dim(self) -> int:
        """Channels of a feature."""
        return self.embed_dim

    @property
    def block(self) -> int:
        """Patches that a number of slots must be a multiple of."""
        return (self.window or self.merge) ** 2


def _windowed(segment_ids: jax.Array, slots: int, execution: Execution):
    """Attention within runs of `slots` patches: the host has laid them out so that each run is a window."""
    ids = rearrange(segment_ids, "b (w s) -> (b w) s", s=slots)
    mask = row_mask(ids, causal=False)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        query, key, value = (rearrange(x, "b (w s) n h -> (b w) s n h", s=slots) for x in (query, key, value))
        out = attention(query, key, value, mask, execution=execution, axes=NATIVE)
        return rearrange(out, "(b w) s n h -> b (w s) n h", b=len(segment_ids))

    return attend


class NativeBlock(nn.Module):
    """Pre-norm block with rotary positions, over whole frames or within windows."""

    config: NativeViTConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: jax.Array, full: jax.Array | None, segment_ids: jax.Array, turned: Rotation | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """[B, P, D], does this layer see whole frames (None: all do) -> [B, P, D], and again for the taps."""
        c = self.config

        def norm(name: str) -> nn.Module:
            return NORMS[c.norm](c.norm_eps, self.dtype, name)

        x = self.execution.block_input(x)
        mask = row_mask(segment_ids, causal=False)
        core = None
        if full is not None:
            narrow = _windowed(segment_ids, c.block, self.execution)

            # the backward pass computes the weights again: else every layer would keep those of whole frames
            @jax.checkpoint
            def core(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
                def wide(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
                    return attention(query, key, value, mask, execution=self.execution, axes=NATIVE)

                return jax.lax.cond(full, wide, narrow, query, key, value)

        attend = Attention(
            c.num_heads, c.num_heads, c.embed_dim // c.num_heads, dtype=self.dtype, execution=self.execution,
            axes=NATIVE, name="attention",
        )  # fmt: skip
        x = x + attend(norm("attention_norm")(x), mask=mask, turned=turned, core=core)[0]
        mlp = MLP(c.mlp_dim, c.activation, c.gated, dtype=self.dtype, name="mlp")
        x = self.execution.constrain(x + mlp(norm("mlp_norm")(x)), "batch", None, None)
        return x, x if c.taps else None


JOINED = 4  # patches


class JoinedPatches(nn.Module):
    """Four patches become one: they look at each other, and an MLP over all of them adds to their mean (reference:
    MiniCPMV4_6ViTWindowAttentionMerger)."""

    config: NativeViTConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """[B, P, D], int32 [B, P] -> [B, P / 4, D]."""
        c = self.config

        def norm(name: str) -> nn.Module:
            return NORMS[c.norm](c.norm_eps, self.dtype, name)

        attend = Attention(
            c.num_heads, c.num_heads, c.embed_dim // c.num_heads, dtype=self.dtype, execution=self.execution,
            axes=NATIVE, name="attention",
        )  # fmt: skip
        x = x + attend(norm("attention_norm")(x), core=_windowed(segment_ids, JOINED, self.execution))[0]
        four = rearrange(x, "b (p s) d -> b p s d", s=JOINED)
        side_by_side = norm("mlp_norm")(rearrange(four, "b p s d -> b p (s d)"))
        hidden = nn.Dense(JOINED * c.mlp_dim, dtype=self.dtype, name="up")(side_by_side)
        more = nn.Dense(c.embed_dim, dtype=self.dtype, name="down")(nn.gelu(hidden, approximate=True))
        return jnp.mean(four, axis=2) + more


class NativeViT(nn.Module):
    """ViT over patches of many pictures in one row, with 2-D rotary positions (Qwen2-VL; with its options Qwen2.5-VL,
    whose layers look through windows, and Qwen3-VL, which adds a learned table and DeepStack taps).

    The host decides the layout (see `mm_jax.data.patches`): which patch stands where, its place in its picture, and the
    frame that it belongs to. Only patches of the same frame see each other, so a row holds any number of pictures.
    """

    config: NativeViTConfig
    dtype: jnp.dtype = jnp.float32
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        patches: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        table_weights: jax.Array | None = None,
        table_index: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Encode the patches of each row.

        Args:
          patches: float [B, P, patch_dim], normalised.
          segment_ids: int32 [B, P], the frame of each patch, 0 for padding.
          positions: int32 [B, P, 2], row and column.
          table_weights, table_index: float and int32 [B, P, 4], the entries of the learned table that a patch's
            position is mixed of; needed where there is one. With a smooth_table float [B, P, 2, table_side] alone, what
            a patch takes of each row and of each column.

        Returns:
          [B, P, embed_dim], or [B, P / 4, embed_dim] where patches are joined, and the hidden states of the taps
          [taps, B, P, embed_dim] or None.

        Raises ValueError: options that do not go together.
        """
        c = self.config
        if c.join_after and (c.window or c.rope_theta or c.taps):
            raise ValueError("patches are not joined together with windows, rotary positions or taps")
        x = nn.Dense(c.embed_dim, use_bias=c.patch_bias, dtype=self.dtype, name="patch_embed")(patches)
        if c.table_side:
            shape = (c.table_side**2, c.embed_dim)
            table = self.param("positions", nn.initializers.normal(0.02), shape)
            weights = table_weights.astype(table.dtype)
            if c.smooth_table:
                mixed = jnp.einsum("bpr,bpc->bprc", weights[:, :, 0], weights[:, :, 1])
                mixed = rearrange(mixed, "b p r c -> b p (r c)") @ table
            else:
                mixed = jnp.einsum("bpkd,bpk->bpd", table[table_index], weights)
            x = x + mixed.astype(self.dtype)
        turned = None
        if c.rope_theta:
            turned = axial_rotation(positions, c.embed_dim // c.num_heads, c.rope_theta)
        full = None
        if c.window and len(c.full_layers) < c.num_layers:
            full = jnp.isin(jnp.arange(c.num_layers), jnp.asarray(c.full_layers, jnp.int32))

        def layers(name: str, count: int, *arrays: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
            several = stack(NativeBlock, count, 0, nn.broadcast, nn.broadcast, execution=self.execution)
            return several(c, self.dtype, self.execution, name=name)(*arrays)

        x = self.execution.constrain(x, "batch", None, None)
        x, states = layers("layers", c.join_after or c.num_layers, x, full, segment_ids, turned)
        if c.join_after:
            x = JoinedPatches(c, self.dtype, self.execution, name="join")(x, segment_ids)
        if 0 < c.join_after < c.num_layers:
            x, _ = layers(
                "joined_layers", c.num_layers - c.join_after, x, full, segment_ids[:, ::JOINED], turned
            )
        if c.post_norm:
            x = NORMS[c.norm](c.norm_eps, self.dtype, "norm")(x)
        return x, states[jnp.asarray(c.taps)] if c.taps else None
