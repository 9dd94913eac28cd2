"""Tokenizers, pictures and messages: what a checkpoint's directory holds besides the weights."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.parity import theirs
from tests.parity.record import note

CORPUS = [
    "what is in the picture? a red circle to the left of a blue square",
    "USER: how many digits are there? ASSISTANT: there are 3 digits, 1 2 and 5.",
    "the quick brown fox jumps over the lazy dog; naïve café, 12.5 %",
    '{"name": "look", "arguments": {"place": [1, 2, 3, 4]}}',
]
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{ message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type in ('image', 'audio', 'video') %}{{ '<' + part.type + '>' }}"
    "{%- else %}{{ part.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def byte_level(*specials: str, begin: bool = False, **options) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE like Qwen's; `specials` are media tokens and headers, `begin` puts <s> before a text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fixed = ["<pad>", "<s>", "</s>", *specials]
    trainer = trainers.BpeTrainer(
        vocab_size=320 + len(fixed),
        special_tokens=fixed,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if begin:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    named = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>") | options
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def sentence_pieces(
    *specials: str, first=("<unk>", "<s>", "</s>", "<pad>"), **options
) -> transformers.PreTrainedTokenizerFast:
    """A BPE with byte fallback and word-initial underscores like Llama's; `first` are the first ids."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fixed = [*first, *specials, *(f"<0x{k:02X}>" for k in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=len(fixed) + 80, special_tokens=fixed, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    named = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>") | options
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> PIL.Image.Image:
    """Smooth colours with hard edges and noise, the hardest for resampling."""
    random = np.random.default_rng(seed + 1000 * width + height)
    y, x = np.mgrid[0:height, 0:width]
    array = np.stack(
        [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x // 3 + y // 5) % 2 * 255], -1
    )
    array = np.clip(array + random.normal(size=array.shape) * 25, 0, 255).astype(np.uint8)
    if mode == "I;16":
        return PIL.Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    image = PIL.Image.fromarray(array)
    if mode in ("RGBA", "LA"):
        alpha = PIL.Image.fromarray(random.integers(0, 256, (height, width), np.uint8))
        image = image.convert(mode)
        image.putalpha(alpha)
        return image
    return image.convert(mode)


def pictures() -> dict[str, PIL.Image.Image]:
    """Odd sizes, aspect ratios of 1:1 to 20:1, and modes."""
    sizes = {"square": (40, 40), "odd": (37, 53), "wide": (200, 10), "tall": (9, 170), "tiny": (3, 2), "dot": (1, 1),
             "large": (301, 199)}  # fmt: skip
    found = {name: picture(*size) for name, size in sizes.items()}
    found |= {mode: picture(45, 31, mode) for mode in ("L", "P", "RGBA", "LA", "1", "CMYK", "I;16")}
    return found


def rotated(image: PIL.Image.Image, orientation: int) -> bytes:
    """A JPEG whose EXIF says how to turn it."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", exif=exif, quality=95)
    return buffer.getvalue()


def messages(*turns) -> list[dict]:
    """Turns of a user and an assistant, each a text or a list of texts and pictures."""
    found = []
    for k, turn in enumerate(turns):
        parts = [turn] if not isinstance(turn, list) else turn
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in parts
        ]
        found.append({"role": ("user", "assistant")[k % 2], "content": content})
    return found


def their_arrays(processor, conversations: list[list[dict]], pad_left: bool = False) -> dict[str, np.ndarray]:
    """What the reference's processor makes of conversations that end with a question."""
    processor.tokenizer.padding_side = "left" if pad_left else "right"
    made = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, add_generation_prompt=True,
        processor_kwargs={"return_tensors": "np", "padding": True},
    )  # fmt: skip
    return dict(made)


def same_preprocessing(lm, processor, images: list, tolerance: float = 0.0, **more) -> float:
    """Every array of the reference's image processor, one picture at a time and all at once."""
    worst = 0.0
    for some in [*([image] for image in images), images]:
        theirs_ = processor.image_processor(images=some, return_tensors="np", **more)
        ours = lm.preprocess(images=some)
        for name, array in ours.items():
            expected = theirs_[name]
            assert array.shape == expected.shape, (name, array.shape, expected.shape)
            worst = max(worst, float(np.abs(array - expected).max()))
    assert worst <= tolerance, worst
    note(lm.family, "preprocessing", worst)
    return worst


def same_tokens(lm, arrays: dict[str, np.ndarray], conversations: list[list[dict]]) -> dict:
    """The batch made of messages has the reference's tokens, and what the model gets is the same as from its arrays.

    Where features take the place of tokens, the tokens do not matter to those systems that have none for them.
    """
    batch, given = lm.batch(messages=conversations), lm.batch(**arrays)
    real, mask = batch["segment_ids"] > 0, arrays["attention_mask"] > 0
    for row, (ours, yours) in enumerate(zip(real, mask, strict=True)):
        ids, found = arrays["input_ids"][row][yours], batch["tokens"][row][ours]
        if lm.processor.rule.pieces and len(ids) == len(found):
            found = np.where(batch["media_index"][row][ours] == -1, found, ids)
        assert found.tolist() == ids.tolist(), (
            lm.processor.tokenizer.decode(found, special=True),
            lm.processor.tokenizer.decode(ids, special=True),
        )
        assert np.array_equal(batch["media_index"][row][ours], given["media_index"][row][yours])
        assert np.array_equal(batch["positions"][row][ours], given["positions"][row][yours])
    for name in sorted(set(batch) & {"pixel_values", "patches", "audio_values"}):
        assert given[name].sum() == pytest.approx(batch[name].sum(), rel=1e-4), name
    return batch


def same_answers(model, processor, lm, conversations: list[list[dict]], new: int = 12) -> None:
    """The texts of the reference's `generate` from the same messages, up to a step that is too close to call."""
    compared = 0
    for conversation in conversations:
        arrays = their_arrays(processor, [conversation])
        ids, margins = theirs.generate(model, arrays, new)
        close = np.flatnonzero(margins[0] < 0.02)
        length = int(close[0]) if len(close) else new
        if length:
            expected = processor.tokenizer.decode(ids[0][:length], skip_special_tokens=True).strip()
            said = lm.chat(conversation, max_new_tokens=length)
            assert said == expected, (said, expected)
        compared += length
    assert compared >= new // 2, "the reference's choices are too close to compare"
