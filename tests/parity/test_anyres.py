"""LLaVA-NeXT and LLaVA-OneVision against transformers: tiles, the order of their features, the whole from messages."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.data.anyres import AnyRes, best_size  # noqa: E402
from mm_jax.data.media_rule import Settings  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity.checks import (  # noqa: E402
    same_after_saving,
    same_gradients,
    same_greedy,
    same_logits,
)

TILE, PATCH = 24, 8
SIDE = TILE // PATCH
SIZES = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
MANY = [[24 * a, 24 * b] for a in range(1, 5) for b in range(1, 5)]
KINDS = {"next": "LlavaNext", "onevision": "LlavaOnevision"}
PICTURES = [(37, 53), (200, 10), (9, 170), (24, 24), (96, 96), (3, 2), (100, 61), (48, 47)]


def image_processor(kind: str):
    if kind == "next":
        size = dict(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
        return transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=SIZES, **size)
    size = {"height": TILE, "width": TILE}
    return transformers.LlavaOnevisionImageProcessorPil(image_grid_pinpoints=MANY, size=size)


def rule(kind: str) -> AnyRes:
    options = {} if kind == "next" else dict(most=2, together=False, video_id=91)
    sizes = SIZES if kind == "next" else MANY
    settings = Settings(image=image_processor(kind).to_dict())
    return AnyRes(
        settings, token_id=90, size=TILE, side=SIDE, sizes=tuple(map(tuple, sizes)), defaults={}, **options
    )


def test_best_size_is_the_reference_s():
    from transformers.image_processing_utils import select_best_resolution

    random = np.random.default_rng(0)
    for size in random.integers(1, 200, (300, 2)).tolist():
        for sizes in (SIZES, MANY):
            assert best_size(tuple(size), [tuple(s) for s in sizes]) == select_best_resolution(size, sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures(kind):
    """Pixel values to the bit, alone and together."""
    mine, processor = rule(kind), image_processor(kind)
    images = [hosts.picture(*size) for size in PICTURES]
    for some in [*([image] for image in images), images]:
        ours, expected = (
            mine.images([np.asarray(i) for i in some]),
            processor(images=some, return_tensors="np"),
        )
        assert ours.keys() == expected.keys()
        for name, array in ours.items():
            assert np.array_equal(array, expected[name]), name
    if kind == "onevision":
        together = [np.asarray(i) for i in images[:3]]
        ours, expected = (
            mine.conversation_images(together),
            processor(images=[images[:3]], return_tensors="np"),
        )
        for name, array in ours.items():
            assert np.array_equal(array, expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_features(kind):
    """What the tokens take is what the reference packs, un-padded, scaled and with newlines."""
    mine = rule(kind)
    random = np.random.default_rng(0)
    newline = random.normal(size=(1, 5)).astype(np.float32)
    vision = SimpleNamespace(image_size=TILE, patch_size=PATCH)
    config = SimpleNamespace(vision_config=vision, image_grid_pinpoints=SIZES if kind == "next" else MANY)
    pack = getattr(transformers.models, f"llava_{kind}")
    pack = getattr(pack, f"modeling_llava_{kind}")
    pack = getattr(pack, f"{KINDS[kind]}Model").pack_image_features
    option = (
        dict(vision_feature_select_strategy="default")
        if kind == "next"
        else dict(vision_aspect_ratio="anyres_max_2")
    )
    images = [np.asarray(hosts.picture(*size)) for size in PICTURES]
    items = mine.items("image", mine.images(images), ())
    scaled = 0
    for image, item in zip(images, items, strict=True):
        features = random.normal(size=(item.features // SIDE**2, SIDE**2, 5)).astype(np.float32)
        [expected], _ = pack(
            SimpleNamespace(config=config), [torch.from_numpy(features)], [list(image.shape[:2])],
            image_newline=torch.from_numpy(newline[0]), **option,
        )  # fmt: skip
        flat = np.concatenate([features.reshape(-1, 5), newline])  # the newline is at -2 + 1
        if item.taps is None:
            ours = np.where((item.index == -2)[:, None], newline, flat[item.index])
        else:
            scaled += 1
            mixed = (flat[item.index[:, None] + item.taps[0]] * item.taps[1][..., None]).sum(1)
            ours = np.where((item.index == -2)[:, None], newline, mixed)
        assert ours.shape == expected.shape
        assert np.abs(ours - expected.numpy()).max() <= 1e-5
    assert scaled >= 3 or kind == "next"


class WithoutVideos(transformers.LlavaOnevisionProcessor):
    """The reference's video processor needs torchvision."""

    def check_argument_for_proper_class(self, name, value):
        return None


def build(kind: str, directory):
    specials = ("<image>",) if kind == "next" else ("<image>", "<video>", "<|im_start|>", "<|im_end|>")
    tokens = {f"{s[1:-1]}_token": s for s in specials[:2]}
    tokenizer = hosts.byte_level(*specials, begin=kind == "next", extra_special_tokens=tokens)
    vocab = dict(vocab_size=len(tokenizer), max_position_embeddings=512)
    ids = {f"{s[1:-1]}_token_index": tokenizer.convert_tokens_to_ids(s) for s in specials[:2]}
    sizes = dict(image_size=TILE, patch_size=PATCH)
    if kind == "next":
        processor = transformers.LlavaNextProcessor(
            image_processor=image_processor(kind), tokenizer=tokenizer, patch_size=PATCH,
            vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=hosts.LLAVA_TEMPLATE,
        )  # fmt: skip
        config = transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**theirs.VISION, **sizes),
            text_config=transformers.MistralConfig(**theirs.TEXT | vocab),
            image_grid_pinpoints=SIZES, **ids,
        )  # fmt: skip
    else:
        processor = WithoutVideos(
            image_processor=image_processor(kind), tokenizer=tokenizer, num_image_tokens=SIDE**2,
            vision_feature_select_strategy="full", chat_template=hosts.CHATML, vision_aspect_ratio="anyres_max_2",
        )  # fmt: skip
        config = transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**theirs.VISION, **sizes),
            text_config=transformers.Qwen2Config(**theirs.TEXT | vocab),
            image_grid_pinpoints=MANY, vision_aspect_ratio="anyres_max_2", **ids,
        )  # fmt: skip
    model = theirs.build(config, directory, f"{KINDS[kind]}ForConditionalGeneration")
    for part in (processor.image_processor, tokenizer):
        part.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(processor.chat_template)
    return model, processor


@pytest.mark.parametrize("kind", ["next", pytest.param("onevision", marks=pytest.mark.slow)])
def test_matches_transformers(kind, tmp_path):
    """From messages: tokens, logits, greedy answers, gradients, the way back."""
    model, processor = build(kind, tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    one = [
        hosts.messages(["what?", hosts.picture(60, 31)]),
        hosts.messages("no picture"),
        hosts.messages([hosts.picture(9, 70), "how many?"], "three", ["and now?"]),
    ]
    several = hosts.messages([hosts.picture(50, 20), hosts.picture(24, 40), "compare"])
    arrays = hosts.their_arrays(processor, [*one, several], pad_left=True)
    hosts.same_tokens(lm, arrays, [*one, several])
    hosts.same_preprocessing(lm, processor, [hosts.picture(*size) for size in PICTURES])
    same_logits(model, lm, arrays)
    same_greedy(model, lm, arrays)
    hosts.same_answers(model, processor, lm, [*one, several])
    same_gradients(model, lm, arrays, tmp_path / "gradients")
    same_after_saving(model, lm, arrays, tmp_path / "out", f"{KINDS[kind]}ForConditionalGeneration")


def test_videos(tmp_path):
    """Frames pooled to half the side, one newline behind them, beside a picture in another row."""
    model, processor = build("onevision", tmp_path)
    lm = mm_jax.load(tmp_path)
    random = np.random.default_rng(0)
    image, video = (processor.tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in ("image", "video"))
    picture = processor.image_processor(images=hosts.picture(24, 24), return_tensors="np")
    pictured = 2 * SIDE**2 + SIDE
    rows = [[15] + [video] * (3 * 4 + 1) + [19, 18, 17], [14, 14] + [image] * pictured + [17, 19]]
    size = max(map(len, rows))
    arrays = {
        "input_ids": np.array([row + [0] * (size - len(row)) for row in rows]),
        "attention_mask": np.array([[1] * len(row) + [0] * (size - len(row)) for row in rows]),
        "pixel_values_videos": random.normal(size=(1, 3, 3, TILE, TILE)).astype(np.float32),
        **picture,
    }
    same_logits(model, lm, arrays)
    frames = [np.stack([np.asarray(hosts.picture(30, 20, seed=k)) for k in range(n)]) for n in (3, 2)]
    pillow = transformers.SiglipImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_mean=processor.image_processor.image_mean,
        image_std=processor.image_processor.image_std,
    )  # fmt: skip
    ours = lm.processor.rule.videos([(video, None) for video in frames])["pixel_values_videos"]
    for some, pixels in zip(frames, ours, strict=True):
        assert np.array_equal(pixels, pillow(images=list(some), return_tensors="np")["pixel_values"])
    asked = [{"type": "video", "video": frames[0]}, {"type": "text", "text": "and"},
             {"type": "video", "video": frames[1]}]  # fmt: skip
    prompt = lm.prompt([{"role": "user", "content": asked}])
    assert (prompt.tokens == video).sum() == 5 * 4 + 2 and prompt.num_images == 5
    first = np.flatnonzero(prompt.tokens == video)[: 3 * 4]
    assert prompt.image_index[first].tolist() == [9 * frame + k for frame in range(3) for k in (0, 1, 3, 4)]
