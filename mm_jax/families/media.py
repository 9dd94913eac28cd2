"""The media rule of a system that has none of its own."""

from __future__ import annotations

from mm_jax.data.media_rule import FixedImage, MediaRule, Settings
from mm_jax.data.patches import PatchLayout
from mm_jax.families.family import System
from mm_jax.models import MultimodalConfig, NativeViTConfig


def patch_layout(vision: NativeViTConfig) -> PatchLayout:
    """How the patches of a tower stand in a row."""
    return PatchLayout(vision.merge, vision.window, vision.table_side)


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
