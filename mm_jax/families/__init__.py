"""The systems whose Hugging Face checkpoints can be read and written: one file each, listed here.

To add one, write a file with a `FAMILY` (see `mm_jax.families.family`):

1. `DEFAULTS` of the reference's config class, and a function that reads its fields through `Fields`; a decoder or tower
   also goes into `mm_jax.families.parts`, so that it can stand in any system.
2. The table of weights, in the names that the reference's `save_pretrained` writes, and the renames that turn other
   spellings into those. Where the shared modules lack something, they gain an option.
3. How its pictures, clips and videos become arrays and tokens: `System.rule`, a function of the directory's settings
   files to a subclass of `mm_jax.data.media_rule.MediaRule`. It names the tokens that stand for a feature and the
   arrays of the reference's processor, makes those arrays of raw media (`images`, `audio`, `videos`;
   `mm_jax.data.pixels` has the steps with the reference's rounding), and says which feature each media token takes
   (`items`): index arrays into the encoder's features, -2 - k for learned markers such as a newline, and the fixed text
   around them. Every way to call the model follows: `lm.batch(messages=...)`, `lm.preprocess`, `lm.chat`, and
   `lm.batch` of the reference's arrays. `FixedImage` serves systems whose pictures take the same tokens each,
   `NativeRule` patches with grids and M-RoPE. A system whose checkpoints have no chat template gives one in
   `System.template`; `write_box` and `parse` are how it writes boxes (`mm_jax.data.box_text`).
4. A line in `FAMILIES`, and a case in `tests/parity`: `checks.py` has the numbers (logits, greedy answers, gradients,
   the way back), `hosts.py` tokenizers, pictures and messages.
"""

import sys
from types import ModuleType

from mm_jax.families import (
    blip_2,
    clip,
    deepseek_vl,
    dinov2,
    gemma,
    gemma2,
    gemma3,
    gemma3_text,
    instructblip,
    intern_vit,
    internlm2,
    internlm3,
    internvl,
    kosmos2,
    llama,
    llava,
    llava_next,
    llava_onevision,
    minicpmv,
    minicpmv4_6,
    mistral,
    mllama,
    opt,
    paligemma,
    parakeet,
    qwen,
    qwen2,
    qwen2_5_vl,
    qwen2_audio,
    qwen2_vl,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_vl,
    qwen3_vl_moe,
    sam,
    siglip,
    siglip2,
    voxtral,
    wav2vec2_conformer,
    whisper,
    xcomposer2,
)
from mm_jax.families.family import Family, Names, System, Weight

FAMILIES: dict[str, Family] = {
    "blip-2": blip_2.FAMILY,
    "blip_2_vision_model": blip_2.TOWER,
    "clip": clip.WHOLE,
    "clip_vision_model": clip.FAMILY,
    "deepseek_vl": deepseek_vl.FAMILY,
    "deepseek_vl_hybrid": deepseek_vl.HYBRID,
    "dinov2": dinov2.FAMILY,
    "dinov2_with_registers": dinov2.WITH_REGISTERS,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3": gemma3.FAMILY,
    "gemma3_text": gemma3_text.FAMILY,
    "instructblip": instructblip.FAMILY,
    "instructblip_vision_model": instructblip.TOWER,
    "intern_vit_6b": intern_vit.ORIGINAL,
    "internlm2": internlm2.FAMILY,
    "internlm3": internlm3.FAMILY,
    "internlmxcomposer2": xcomposer2.FAMILY,
    "internvl": internvl.FAMILY,
    "internvl_chat": internvl.ORIGINAL,
    "internvl_vision": intern_vit.FAMILY,
    "kosmos-2": kosmos2.FAMILY,
    "llama": llama.FAMILY,
    "llava": llava.FAMILY,
    "llava_next": llava_next.FAMILY,
    "llava_onevision": llava_onevision.FAMILY,
    "minicpmv": minicpmv.FAMILY,
    "minicpmv4_6": minicpmv4_6.FAMILY,
    "mistral": mistral.FAMILY,
    "mllama": mllama.FAMILY,
    "mllama_vision_model": mllama.TOWER,
    "opt": opt.FAMILY,
    "paligemma": paligemma.FAMILY,
    "parakeet_ctc": parakeet.CTC,
    "parakeet_encoder": parakeet.FAMILY,
    "qwen": qwen.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen2_audio": qwen2_audio.FAMILY,
    "qwen2_audio_encoder": qwen2_audio.ENCODER_FAMILY,
    "qwen2_vl": qwen2_vl.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_5": qwen3_5.FAMILY,
    "qwen3_5_text": qwen3_5.TEXT,
    "qwen3_moe": qwen3_moe.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
    "qwen3_vl_moe": qwen3_vl_moe.FAMILY,
    "sam_vision_model": sam.FAMILY,
    "siglip": siglip.WHOLE,
    "siglip2": siglip2.WHOLE,
    "siglip2_vision_model": siglip2.FAMILY,
    "siglip_vision_model": siglip.FAMILY,
    "voxtral": voxtral.FAMILY,
    "voxtral_encoder": voxtral.ENCODER_FAMILY,
    "wav2vec2-conformer": wav2vec2_conformer.FAMILY,
    "whisper": whisper.FAMILY,
}

# those whose files have model_types of others
ARCHITECTURES: dict[str, Family] = {"InternLMXComposer2ForCausalLM": xcomposer2.FAMILY}


def families() -> dict[str, tuple[str, ...]]:
    """The model types that can be loaded, and what each takes.

    >>> families()["llama"]
    ('text',)
    """
    return {name: family.takes for name, family in FAMILIES.items()}


class _Package(ModuleType):
    """`mm_jax.families` is this package, and `mm_jax.families()` the list of names."""

    def __call__(self) -> dict[str, tuple[str, ...]]:
        return families()


sys.modules[__name__].__class__ = _Package

__all__ = ["ARCHITECTURES", "FAMILIES", "Family", "Names", "System", "Weight", "families"]
