"""MultimodalLM: encoders -> projectors -> splice -> decoder."""

from dataclasses import dataclass, field
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from mm_jax.models.attention import Mask, block_mask, row_mask, write_slots
from mm_jax.models.audio import AudioEncoderConfig
from mm_jax.models.cross import Context
from mm_jax.models.decoder import Cache, Decoder, DecoderConfig, Deep, take_features
from mm_jax.models.encoders import AudioConfig, VisionConfig, dummy_inputs, encoder, slot_arrays
from mm_jax.models.execution import Execution
from mm_jax.models.heads import DenseHeads, HeadConfig
from mm_jax.models.native import NativeViTConfig
from mm_jax.models.projectors import PROJECTORS, ProjectorConfig
from mm_jax.models.vision import ViTConfig

Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class MultimodalConfig:
    """What a model is made of. A part that is None does not exist; its projector is then ignored.

    Attributes:
      markers: learned vectors that tokens take besides media features, such as LLaVA-NeXT's newline of the picture.
      two_way: which tokens see each other whatever their order: none; each run of "media" tokens (Gemma-3), as far as
        the decoder's windows reach; or the whole "prefix" up to the answer (PaliGemma), beyond windows as well.
      heads: dense-target heads over the encoders, for training them; None when the encoders come trained.
      dtype: compute dtype of every part; parameters are float32.
      deep_projector: of the features that the vision tower's taps give to the decoder's first layers (DeepStack).
      markers_projected: they are among the encoder's features, and so go through the image projector.
    """

    vision: VisionConfig | None = field(default_factory=ViTConfig)
    audio: AudioConfig | None = field(default_factory=AudioEncoderConfig)
    image_projector: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(merge=(2, 2)))
    audio_projector: ProjectorConfig = field(default_factory=lambda: ProjectorConfig(merge=(8, 1)))
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    two_way: Literal["none", "media", "prefix"] = "none"
    heads: HeadConfig | None = None
    dtype: str = "float32"
    deep_projector: ProjectorConfig | None = None
    markers: int = 0
    markers_projected: bool = False

    @property
    def native(self) -> bool:
        """Whether pictures come as patches of any number, instead of slots of one size."""
        return isinstance(self.vision, NativeViTConfig)

    @property
    def crossed(self) -> bool:
        """Whether the decoder reads features in layers of their own, instead of in place of tokens."""
        return bool(self.decoder.cross_layers)

    @property
    def patch_slots(self) -> bool:
        """Whether an image slot is a single patch."""
        return self.native and not self.vision.slot_patches

    @property
    def image_tokens(self) -> int:
        """Pseudo-tokens of one image slot."""
        if self.vision is None:
            return 0
        if self.native:
            return self.image_projector.num_queries if self.vision.slot_patches else 0
        return self.image_projector.num_tokens(self.vision.feature_grid)

    @property
    def feature_dim(self) -> int:
        """Channels of a media feature, those for the decoder's first layers included."""
        deep = 0 if self.deep_projector is None else len(self.vision.taps)
        return (1 + deep) * self.decoder.embed_dim

    @property
    def audio_tokens(self) -> int:
        """Pseudo-tokens of one audio slot."""
        return 0 if self.audio is None else self.audio_projector.num_tokens((self.audio.num_positions, 1))


def splice(
    embeddings: jax.Array,
    features: jax.Array,
    media_index: jax.Array,
    markers: jax.Array | None = None,
    taps: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Put media features at the text positions that ask for them.

    Args:
      embeddings: [B, S, D].
      features: [B, P, D], the projected features of a row, images first; or [P, D] that all rows share.
      media_index: int32 [B, S], the feature a position takes, -1 for text, -2 - k for the k-th marker.
      markers: [K, D].
      taps: int32 and float [B, S, T]: a position takes a mixture of T features, at these distances from media_index,
        with these weights. So a grid of features is stretched bilinearly.
    """
    if taps is None:
        taken = take_features(features, media_index)
    else:
        distances, weights = taps[0], taps[1].astype(features.dtype)
        taken = sum(
            take_features(features, media_index + distances[..., k]) * weights[..., k, None]
            for k in range(weights.shape[-1])
        )
    out = jnp.where((media_index >= 0)[..., None], taken, embeddings)
    if markers is not None:
        marked = markers.astype(out.dtype)[jnp.maximum(-2 - media_index, 0)]
        out = jnp.where((media_index < -1)[..., None], marked, out)
    return out


def dummy_batch(config: MultimodalConfig) -> dict[str, jax.Array]:
    """A batch of one row with one slot of every medium, to initialise from."""
    ones = jnp.ones((1, 8), jnp.int32)
    batch = {"tokens": ones, "segment_ids": ones, "positions": ones, "media_index": -ones}
    for part in (config.vision, config.audio):
        if part is not None:
            batch |= {name: jnp.asarray(x[None]) for name, x in dummy_inputs(part).items()}
    if config.crossed:
        batch["seen"] = jnp.ones((1, 8, 1), jnp.int8)
    return batch


def _instructions(batch: Batch) -> dict[str, jax.Array]:
    """What a Q-Former reads beside its queries."""
    return {"text": rearrange(batch["instructions"], "b n l -> (b n) l")} if "instructions" in batch else {}


class MultimodalLM(nn.Module):
    """Encoders, projectors, splice and decoder as one pure function of (params, batch).

    A batch holds tokens, segment_ids, positions, media_index int32 [B, S] and, where rows have slots for them,
    pixel_values [B, N, H, W, 3] and audio_values [B, M, F, mels] with audio_frames [B, M]. The features of a row are
    [N * image_tokens | M * audio_tokens] in this order. A native-resolution tower takes patches [B, P, patch_dim] and
    the other arguments of `NativeViT` as patch_... instead of pixel_values, and gives P / merge**2 features; one with
    slot_patches takes them with slots, [B, N, P, patch_dim], and gives N * image_tokens.
    Where features are mixed, media_taps int32 and tap_weights float32 [B, S, T] say how, see `splice`.
    What `encode` has made before may come as features [P, D], for all rows, instead of media.
    Positions are [B, S, 3] for a decoder with rope_sections; [B, S] there means text alone. Where the image projector
    has a text_vocab, instructions int32 [B, N, L] say what to look for in each picture; -1 is padding, on the right.
    blocks int32 [B, S] go with `MultimodalConfig.two_way`: the tokens of a segment with the same number above 0 see
    each other.
    A decoder with cross_layers reads the features in those, and none takes the place of a token. seen int8 [B, S, C]
    then says what each token has to do with each of C equal shares of its row's features, see
    `mm_jax.models.cross.Context`. Of features that come for all rows, slot_firsts int32 [B, N] says where those of each
    image slot begin.
    """

    config: MultimodalConfig
    execution: Execution = Execution()

    def setup(self) -> None:
        c, execution = self.config, self.execution
        dtype = jnp.dtype(c.dtype)
        width = c.decoder.embed_dim
        if c.vision is not None:
            self.vision = encoder(c.vision, dtype, execution)
            self.image_projector = PROJECTORS[c.image_projector.kind](c.image_projector, width, dtype)
        if c.deep_projector is not None:
            several = nn.vmap(
                PROJECTORS[c.deep_projector.kind],
                in_axes=(0, None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                axis_size=len(c.vision.taps),
            )
            self.deep_projector = several(c.deep_projector, width, dtype)
        if c.audio is not None:
            self.audio = encoder(c.audio, dtype, execution)
            self.audio_projector = PROJECTORS[c.audio_projector.kind](c.audio_projector, width, dtype)
        if c.markers:
            merged = c.image_projector.merged_dim(c.vision.feature_dim) if c.markers_projected else width
            init = nn.initializers.normal(merged**-0.5)
            self.markers = [self.param(f"marker{k}", init, (merged,)) for k in range(c.markers)]
        if c.heads is not None:
            self.heads = DenseHeads(c.heads, dtype)
        self.decoder = Decoder(c.decoder, dtype, execution)

    def _native_features(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Projected features [B, F, D], and those for the decoder's first layers [K, B, F, D] or None."""
        names = ("segment_ids", "positions", "table_weights", "table_index")
        inputs = [batch.get(name) for name in ("patches", *(f"patch_{name}" for name in names))]
        if self.config.vision.slot_patches:
            rows = len(inputs[0])
            inputs = [None if x is None else rearrange(x, "b n ... -> (b n) ...") for x in inputs]
            x, _ = self.vision(*inputs)
            x = self.image_projector(x, None, inputs[1] > 0, inputs[2])
            return rearrange(x, "(b n) t d -> b (n t) d", b=rows), None
        x, taps = self.vision(*inputs)
        grid = (x.shape[1], 1)
        deep = None if self.config.deep_projector is None else self.deep_projector(taps, grid)
        return self.image_projector(x, grid), deep

    def _image_features(self, batch: Batch) -> jax.Array:
        """[B * N, patches, C]"""
        given = (batch[name] for name, _, _ in slot_arrays(self.config.vision))
        return self.vision(*(rearrange(array, "b n ... -> (b n) ...") for array in given))

    def _audio_features(self, batch: Batch) -> jax.Array:
        """[B * M, positions, C]"""
        values = rearrange(batch["audio_values"], "b m f c -> (b m) f c")
        return self.audio(values, rearrange(batch["audio_frames"], "b m -> (b m)"))

    def encode(self, batch: Batch) -> jax.Array | None:
        """The projected media features of each row: [B, P, D], pictures first; None without media.

        With DeepStack [B, P, (1 + K) * D]: behind each feature stand those for the decoder's first K layers, zeros for
        sound.
        """
        rows = batch["tokens"].shape[0]
        features = []
        if "patches" in batch:
            with jax.named_scope("image"):
                projected, deep = self._native_features(batch)
            if deep is not None:
                projected = jnp.concatenate([projected, rearrange(deep, "k b p d -> b p (k d)")], axis=-1)
            features.append(projected)
        if "pixel_values" in batch:
            with jax.named_scope("image"):
                grid = self.config.vision.feature_grid
                projected = self.image_projector(self._image_features(batch), grid, **_instructions(batch))
            features.append(rearrange(projected, "(b n) t d -> b (n t) d", b=rows))
        if "audio_values" in batch:
            with jax.named_scope("audio"):
                encoded = self._audio_features(batch)
                frames = rearrange(batch["audio_frames"], "b m -> (b m) 1")
                real = jnp.arange(encoded.shape[1]) < self.config.audio.positions_of(frames)
                projected = self.audio_projector(encoded, (encoded.shape[1], 1), real)
            features.append(rearrange(projected, "(b m) t d -> b (m t) d", b=rows))
        width = self.config.feature_dim
        wide = [jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1]))) for x in features]
        return jnp.concatenate(wide, axis=1) if wide else None

    def dense(self, batch: Batch) -> dict[str, jax.Array]:
        """Logits of the dense targets.

        image_labels [B, N, P, L], image_boxes [B, N, P, 4, bins], audio_labels [B, M, T, L].
        """
        rows = batch["tokens"].shape[0]
        outputs = {}
        if "pixel_values" in batch:
            outputs |= self.heads.image(
                rearrange(self._image_features(batch), "(b n) p c -> b n p c", b=rows)
            )
        if "audio_values" in batch:
            outputs |= self.heads.audio(
                rearrange(self._audio_features(batch), "(b m) t c -> b m t c", b=rows)
            )
        return outputs

    def _embed(self, batch: Batch) -> tuple[jax.Array, Deep | None]:
        embeddings = self.decoder.embed(batch["tokens"])
        if self.config.crossed:
            return embeddings, None
        features = batch["features"] if "features" in batch else self.encode(batch)
        if features is None:
            return embeddings, None
        index, width, deep = batch["media_index"], embeddings.shape[-1], None
        if self.config.deep_projector is not None:
            deep = rearrange(features[..., width:], "... p (k d) -> k ... p d", d=width), index
        taps = (batch["media_taps"], batch["tap_weights"]) if "media_taps" in batch else None
        markers = None
        if self.config.markers:
            markers = jnp.stack(self.markers).astype(embeddings.dtype)
            if self.config.markers_projected:
                markers = self.image_projector(markers[None], None)[0]
        return splice(embeddings, features[..., :width], index, markers, taps), deep

    def _context(self, batch: Batch, cache: Cache | None = None) -> Context | None:
        """What the decoder's own layers for features read; None where there is nothing."""
        if not self.config.crossed:
            return None
        features, seen = None, batch.get("seen")
        if "slot_firsts" in batch:
            each = jnp.arange(self.config.image_tokens)
            index = rearrange(batch["slot_firsts"][..., None] + each, "b n t -> b (n t)")
            features = take_features(batch["features"], index)
        elif seen is not None:
            features = self.encode(batch)
        if features is not None:
            return Context.of(seen, features.shape[1], features)
        if cache is None or not cache["seen"].shape[1]:
            return None
        # the keys and values of the features are known, and new tokens see what the last one saw
        seen = jnp.broadcast_to(cache["seen"][:, None], (*batch["tokens"].shape, cache["seen"].shape[1]))
        return Context.of(seen, cache["context_key"].shape[2], None)

    def _media(self, batch: Batch) -> jax.Array | None:
        """Which tokens the decoder's adapters are for."""
        if not self.config.decoder.adapter_rank:
            return None
        index = batch.get("media_index")  # new tokens have none
        return jnp.zeros(batch["tokens"].shape, bool) if index is None else index != -1

    def __call__(self, batch: Batch) -> jax.Array:
        """Logits float32 [B, S, vocab] of packed rows; segments do not see each other."""
        if self.is_initializing() and self.config.heads is not None:
            self.dense(batch)
        return self.decoder.logits(self.hidden(batch))

    def hidden(self, batch: Batch) -> jax.Array:
        """What `logits` reads: [B, S, D]."""
        segments = batch["segment_ids"]
        mask, always = self._two_way(batch, row_mask(segments), segments, batch.get("blocks"))
        x, deep = self._embed(batch)
        media = self._media(batch)
        context = self._context(batch)
        return self.decoder.hidden(
            x, mask, batch["positions"], deep=deep, always=always, media=media, context=context
        )[0]

    def logits(self, x: jax.Array) -> jax.Array:
        """[B, T, D] of `hidden` -> float32 [B, T, vocab]."""
        return self.decoder.logits(x)

    def _two_way(
        self, batch: Batch, mask: Mask, key_segments: jax.Array, key_blocks: jax.Array | None
    ) -> tuple[Mask | jax.Array, jax.Array | None]:
        """The masks for `Decoder.hidden`: within its windows, and whatever they are."""
        if key_blocks is None:
            return mask, None
        together = block_mask(batch["segment_ids"], key_segments, batch["blocks"], key_blocks)
        if self.config.two_way == "prefix":
            return mask, together
        return mask.array(key_segments.shape[1]) | together, None

    def extend(
        self, batch: Batch, cache: Cache, starts: jax.Array, last: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Advance a KV cache by the tokens of a batch: prefill, the next turn of a chat, or one decoding step.

        Args:
          batch: as for `__call__`, right-padded; padding (segment 0) is written but never attended to.
          cache: from `init_cache`, at least starts + S slots long.
          starts: int32 [B], the slot where the first token of each row goes.
          last: int32 [B], the only token of each row whose logits are wanted: those of a long prompt are large.

        Returns:
          Logits float32 [B, S, vocab], or [B, 1, vocab] with `last`, and the advanced cache.
        """
        x, cache = self.advance(batch, cache, starts, last)
        return self.decoder.logits(x), cache

    def advance(
        self, batch: Batch, cache: Cache, starts: jax.Array, last: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """`extend` up to what `logits` reads: [B, S, D], or [B, 1, D] with `last`, and the advanced cache."""
        segments = batch["segment_ids"]
        cache = cache | {"segment_ids": write_slots(cache["segment_ids"], segments, starts)}
        slots = starts[:, None] + jnp.arange(segments.shape[1])
        mask = Mask(segments, cache["segment_ids"], slots)
        blocks = batch.get("blocks")
        if blocks is not None:  # they never reach back to tokens of an earlier call, which are seen anyway
            blocks = write_slots(jnp.zeros_like(cache["segment_ids"]), blocks, starts)
        mask, always = self._two_way(batch, mask, cache["segment_ids"], blocks)
        x, deep = self._embed(batch)
        media = self._media(batch)
        context = self._context(batch, cache)
        x, cache = self.decoder.hidden(
            x, mask, batch["positions"], cache, starts, always=always, deep=deep, media=media, context=context
        )
        if "seen" in batch:
            newest = jnp.maximum(jnp.sum(segments > 0, axis=1) - 1, 0)
            cache["seen"] = jnp.take_along_axis(batch["seen"], newest[:, None, None], axis=1)[:, 0]
        if last is not None:
            x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return x, cache
