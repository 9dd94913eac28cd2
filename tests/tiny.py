"""A model of a few thousand random weights with real pictures and clips, for tests of inference."""

from __future__ import annotations

import jax
import numpy as np
import PIL.Image
import PIL.ImageDraw

from mm_jax.data.audio import AudioRule
from mm_jax.data.image import ImageRule
from mm_jax.data.messages import Audio, Box, Conversation, Image, Message, Text
from mm_jax.data.processor import ProcessorConfig, fit_processor
from mm_jax.models import AudioEncoderConfig, DecoderConfig, MultimodalConfig, ProjectorConfig, ViTConfig

WORDS = (
    "what colour is the square which word do you hear how many circles are there red green blue one two three"
)


def picture(seed: int = 0, size: tuple[int, int] = (40, 24)) -> PIL.Image.Image:
    """Noise with a coloured square, no two alike."""
    random = np.random.default_rng(seed)
    image = PIL.Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8))
    PIL.ImageDraw.Draw(image).rectangle((4, 4, 14, 14), fill=("red", "green", "blue")[seed % 3])
    return image


def clip(seed: int = 0, seconds: float = 0.3) -> np.ndarray:
    """A noisy tone at 16 kHz."""
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16_000)) / 16_000
    wave = 0.3 * np.sin(2 * np.pi * (300 + 200 * seed) * time) + 0.01 * random.normal(size=time.shape)
    return wave.astype(np.float32)


def user(text: str, images: tuple[int, ...] = (), clips: tuple[int, ...] = ()) -> Message:
    media = [Image(picture(k)) for k in images] + [Audio(clip(k), 16_000) for k in clips]
    return Message("user", (*media, Text(text)))


def conversations() -> list[Conversation]:
    """A little text for the tokenizer."""
    words = WORDS.split()
    answers = [Text("red"), Text("a blue circle"), Box((4, 4, 15, 15))]
    return [
        Conversation((user(" ".join(words[k : k + 6]), (0,)), Message("assistant", (answers[k % 3],))))
        for k in range(len(words))
    ]


def tiny(resampler: bool = False, vision: bool = True, audio: bool = True, seed: int = 0):
    """(config, params, processor) of a model with random weights, large enough for its answers to vary."""
    grid = (4, 4)
    processor = fit_processor(
        ProcessorConfig(
            image=ImageRule(height=32, width=32, num_tokens=4) if vision else None,
            audio=AudioRule(max_frames=32, num_tokens=4, frames_per_token=8) if audio else None,
            box_bins=16,
        ),
        conversations() if vision else [],
        400,
    )
    image_projector = ProjectorConfig(merge=(2, 2), hidden_dim=24)
    if resampler:
        image_projector = ProjectorConfig("resampler", hidden_dim=24, num_queries=4, num_heads=2)
    config = MultimodalConfig(
        vision=ViTConfig(32, 32, 32 // grid[0], 24, num_layers=1, num_heads=2, mlp_dim=32)
        if vision
        else None,
        audio=AudioEncoderConfig(max_frames=32, embed_dim=24, num_layers=1, num_heads=2, mlp_dim=32)
        if audio
        else None,
        image_projector=image_projector,
        audio_projector=ProjectorConfig(merge=(4, 1), hidden_dim=24),
        decoder=DecoderConfig(
            processor.vocab_size,
            embed_dim=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            mlp_dim=48,
        ),
    )
    return config, random_params(config, seed), processor


def random_params(config: MultimodalConfig, seed: int) -> dict:
    """Freshly initialised, scaled up, no kernel zero: what a model attends to then changes what it says."""
    from mm_jax.train.setup import init_params

    random = np.random.default_rng(seed)

    def draw(x: jax.Array) -> jax.Array:
        if x.ndim < 2:
            return x
        # branches of a new model are closed, see mm_jax.models.layers
        return 1.5 * (x if np.any(x) else random.normal(0, x.shape[-2] ** -0.5, x.shape).astype(np.float32))

    return jax.tree.map(draw, init_params(config, seed))
