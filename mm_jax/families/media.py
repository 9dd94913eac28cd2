"""The media rule of a system that has none of its own, and how media stand in a batch of a model."""

from __future__ import annotations

from collections.abc import Sequence

from mm_jax.data.media_rule import FixedImage, MediaRule, Settings
from mm_jax.data.packing import Layout
from mm_jax.data.patches import PatchLayout
from mm_jax.families.family import System
from mm_jax.models import MultimodalConfig, NativeViTConfig, ViTConfig, slot_arrays


def patch_layout(vision: NativeViTConfig) -> PatchLayout:
    """How the patches of a tower stand in a row."""
    return PatchLayout(vision.merge, vision.window, vision.table_side, vision.smooth_table)


def media_rule(system: System, settings: Settings) -> MediaRule:
    """The system's own rule, or else the one that follows from its config."""
    if system.rule is not None:
        return system.rule(settings)
    config = system.config
    if not isinstance(config, MultimodalConfig) or config.vision is None:
        return MediaRule(settings)
    if system.image_token_id is None:
        return MediaRule(settings)  # a text that no picture can be put into
    return FixedImage(
        settings,
        token_id=system.image_token_id,
        size=config.vision.inputs["pixel_values"],
        num_tokens=config.image_tokens,
    )


def layout_of(
    config: MultimodalConfig, pad_id: int | None, stop_ids: Sequence[int], taps: bool = False
) -> Layout:
    """Media slots and padding: the pad token, or else the first stop token as in the reference's `generate`, or 0."""
    vision, audio = config.vision, config.audio
    pad = next((i for i in (pad_id, *stop_ids) if i is not None), 0)
    return Layout(
        image_tokens=config.image_tokens,
        image_size=(0, 0) if vision is None or config.native else vision.inputs["pixel_values"],
        image_grid=_image_grid(config),
        audio_tokens=config.audio_tokens,
        audio_size=(0, 0) if audio is None else (audio.max_frames, audio.num_mels),
        taps=taps,
        patches=patch_layout(vision) if config.patch_slots else None,
        slot_arrays=_slot_arrays(config),
        position_axes=3 if config.decoder.rope_sections else 0,
        two_way=config.two_way,
        shares=vision.tiles if config.crossed else 0,
        pad_id=pad if 0 <= pad < config.decoder.vocab_size else 0,
    )


def _image_grid(config: MultimodalConfig) -> tuple[int, int]:
    """See `Layout.image_grid`."""
    vision, projector = config.vision, config.image_projector
    apart = isinstance(vision, ViTConfig) and vision.class_token != "keep" and projector.order == "rows"
    if not apart or projector.kind not in ("linear", "mlp"):
        return (0, 0)
    return vision.grid[0] // projector.merge[0], vision.grid[1] // projector.merge[1]


def _slot_arrays(config: MultimodalConfig) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """See `Layout.slot_arrays`."""
    vision = config.vision
    if vision is None:
        return ()
    if not config.native:
        several = slot_arrays(vision)
        if longest := config.image_projector.text_length:
            several = (*several, ("instructions", (longest,), "int32"))
        return several if len(several) > 1 else ()
    arrays = patch_layout(vision).arrays(vision.patch_dim)
    if not vision.slot_patches:
        return arrays
    return tuple((name, (vision.slot_patches, *shape), dtype) for name, shape, dtype in arrays)
