"""InstructBLIP (reference: InstructBlipForConditionalGeneration): BLIP-2 whose Q-Former reads the instruction too."""

from __future__ import annotations

from functools import partial

from mm_jax.families.blip_2 import system, tower_system
from mm_jax.families.family import Family

FAMILY = Family("instructblip", ("text", "image"), partial(system, instructed=True))
TOWER = Family("instructblip_vision_model", ("image",), tower_system, ((r"^vision_model\.", ""),))
