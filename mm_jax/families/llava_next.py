"""LLaVA-NeXT (reference: LlavaNextForConditionalGeneration): LLaVA with pictures in tiles, and a learned newline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mm_jax.data.anyres import AnyRes
from mm_jax.errors import UserError
from mm_jax.families.family import Family, System, Weight
from mm_jax.families.fields import Fields
from mm_jax.families.llava import DEFAULTS as LLAVA
from mm_jax.families.llava import IMAGE_PROCESSOR, TOWER, read
from mm_jax.families.llava import RENAMES as LLAVA_RENAMES

DEFAULTS = LLAVA | {
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
RENAMES = (*LLAVA_RENAMES, (r"^model\.image_newline$", "image_newline"))


def tiled(
    fields: Fields,
    names: frozenset[str],
    tower: Mapping[str, Any],
    decoder: str,
    defaults: Mapping[str, Any],
    **options: Any,
) -> System:
    """LLaVA with a newline, and tiles after `image_grid_pinpoints`.

    Args:
      tower, decoder: see `mm_jax.families.llava.read`.
      defaults: of the image processor.
      options: of `AnyRes`.
    """
    token, sizes = fields("image_token_index"), fields("image_grid_pinpoints")
    system = read(fields, names, tower, decoder, markers=1)
    vision = system.config.vision
    side = vision.grid[0]
    if vision.height != vision.width or system.config.image_tokens != side**2:
        raise UserError("config.json: tiles need a square tower whose class token is dropped")
    if any(length % vision.height for size in sizes for length in size):
        raise fields.unsupported("image_grid_pinpoints", f"sides are multiples of {vision.height}")
    rule = partial(
        AnyRes,
        token_id=token,
        size=vision.height,
        side=side,
        sizes=tuple(map(tuple, sizes)),
        defaults=defaults,
        **options,
    )
    newline = Weight("image_newline", "marker0")
    return replace(system, weights=(*system.weights, newline), rule=rule)


def _system(values: Mapping[str, Any], names: frozenset[str]) -> System:
    return tiled(Fields(values, DEFAULTS), names, TOWER, "llama", IMAGE_PROCESSOR)


FAMILY = Family("llava_next", ("text", "image"), _system, RENAMES)
