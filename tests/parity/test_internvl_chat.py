"""InternVL from messages: tiles, frames, tokens and answers against transformers."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.data.image import Transform  # noqa: E402
from mm_jax.data.messages import Box, Text  # noqa: E402
from mm_jax.data.pieces import tiles  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity.test_native_video import reference  # noqa: E402

TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<|im_start|>", "<|im_end|>")


class InternVLProcessor(transformers.InternVLProcessor):
    """Without a video processor, which needs torchvision."""

    def __init__(
        self, image_processor=None, tokenizer=None, image_seq_length=256, chat_template=None, **kwargs
    ):
        transformers.ProcessorMixin.__init__(
            self, image_processor, tokenizer, chat_template=chat_template, **kwargs
        )
        self.image_seq_length = image_seq_length
        self.start_image_token, self.end_image_token = tokenizer.start_image_token, tokenizer.end_image_token
        self.image_token, self.video_token = tokenizer.context_image_token, tokenizer.video_token
        self.image_token_id = tokenizer.context_image_token_id
        self.multimodal_pattern = re.compile(f"(?P<image>{self.image_token})|(?P<video>{self.video_token})")


def build(directory):
    """A checkpoint with everything, as transformers writes it: (model, processor)."""
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = hosts.byte_level(*TOKENS, extra_special_tokens=names)
    sizes = dict(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=6)
    processor = InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessorPil(**sizes),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=hosts.CHATML.replace(
            "'<' + part.type + '>'", "('<IMG_CONTEXT>' if part.type == 'image' else '<video>')"
        ),
    )
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            **theirs.VISION | dict(image_size=[32, 32], patch_size=[8, 8], num_hidden_layers=2)
        ),
        text_config=transformers.Qwen2Config(
            **theirs.TEXT | dict(vocab_size=len(tokenizer) + 3, max_position_embeddings=512)
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
    )
    model = theirs.build(config, directory, "InternVLForConditionalGeneration")
    processor.save_pretrained(directory)
    return model, processor


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("internvl")
    return *build(directory), mm_jax.load(directory)


CONVERSATIONS = [
    hosts.messages(["what is in the picture?", hosts.picture(60, 31)]),
    hosts.messages([hosts.picture(17, 40, "L"), hosts.picture(33, 33), "compare: naïve, 12 %"], "a red circle",
                   ["and now?", hosts.picture(90, 24)]),
    hosts.messages("no picture at all"),
]  # fmt: skip


def test_pictures(pair):
    """Tiles of odd sizes and modes, to the bit."""
    _, processor, lm = pair
    hosts.same_preprocessing(lm, processor, list(hosts.pictures().values()), 0.0)


def test_tokens_and_answers(pair):
    model, processor, lm = pair
    hosts.same_tokens(lm, hosts.their_arrays(processor, CONVERSATIONS), CONVERSATIONS)
    hosts.same_answers(model, processor, lm, CONVERSATIONS[:2], 6)


def test_videos(pair):
    """A frame is a tile behind its number; two videos beside pictures, before, between and behind them."""
    model, processor, lm = pair
    frames = [[hosts.picture(40, 30, seed=k) for k in range(n)] for n in (3, 2)]
    one, two = hosts.picture(60, 31), hosts.picture(33, 33)
    parts = [
        {"type": "video", "video": frames[0]}, {"type": "image", "image": one}, {"type": "text", "text": "compare"},
        {"type": "video", "video": frames[1]}, {"type": "image", "image": two}, {"type": "text", "text": "to this"},
    ]  # fmt: skip
    talk = [{"role": "user", "content": parts}]
    as_tiles = transformers.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=False)
    pixels = {"video": [as_tiles(images=video, return_tensors="np")["pixel_values"] for video in frames]}
    found = lm.preprocess(videos=frames)["pixel_values_videos"]
    assert all(np.array_equal(a, b) for a, b in zip(found, pixels["video"], strict=True))
    made = [processor.image_processor(images=[image], return_tensors="np") for image in (one, two)]
    pixels["image"] = [one["pixel_values"] for one in made]
    text = processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    inputs = {"pixel_values_videos": pixels["video"]}
    written = {
        "video": [processor.replace_video_token(inputs, k) for k in range(2)],
        "image": [
            processor.replace_image_token({"num_patches": [len(x) for x in pixels["image"]]}, k)
            for k in (0, 1)
        ],
    }
    order, pieces = [], re.split("(<video>|<IMG_CONTEXT>)", text)
    for k in range(1, len(pieces), 2):
        kind = "video" if pieces[k] == "<video>" else "image"
        pieces[k] = written[kind].pop(0)
        order.append(pixels[kind].pop(0))
    ids = np.array([processor.tokenizer("".join(pieces))["input_ids"]])
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": np.concatenate(order)}
    hosts.same_tokens(lm, arrays, [talk])
    batch = lm.batch(messages=talk)
    real = batch["segment_ids"][0] > 0
    expected = theirs.logits(model, arrays)[0]
    assert 0.1 < expected.std() < 10
    assert np.abs(np.asarray(lm.apply(lm.params, batch))[0][real] - expected).max() <= 1e-4
    with pytest.raises(mm_jax.UserError, match="takes no .pixel_values_videos"):
        lm.batch(input_ids=ids, pixel_values_videos=np.zeros((1, 2, 3, 32, 32), np.float32))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_frames": 4},
        {"fps": 2},
        {"num_frames": 5, "initial_shift": False},
        {"fps": 1, "initial_shift": 2.5},
    ],
)
def test_frames(pair, settings):
    """Which frames of a video are looked at."""
    values = dict(num_frames=None, fps=None, initial_shift=True) | settings
    theirs_ = reference("internvl.video_processing_internvl").InternVLVideoProcessor.sample_frames
    rule = type(pair[2].checkpoint.rule)(
        replace(pair[2].checkpoint.rule.settings, video=settings | {"do_sample_frames": True}),
        token_id=5, size=(32, 32), num_tokens=4,
    )  # fmt: skip
    for total, rate in [(7, 3.0), (30, 10.0), (31, 24.0), (100, 30.0), (2001, 29.97)]:
        metadata = SimpleNamespace(total_num_frames=total, fps=rate)
        known = {k: v for k, v in values.items() if v is not None and k != "num_frames"}
        expected = theirs_(
            SimpleNamespace(num_frames=values["num_frames"], initial_shift=True), metadata, **known
        )
        assert rule._chosen(total, rate).tolist() == expected.tolist()
    if "num_frames" in settings:
        with pytest.raises(mm_jax.UserError, match="a video of 3 frames, of which"):
            rule._chosen(3, None)
    else:
        with pytest.raises(mm_jax.UserError, match="does not say its rate"):
            rule._chosen(30, None)


def test_grids_of_tiles():
    """Every grid of the reference, ties included."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    random = np.random.default_rng(0)
    for width, height in [*random.integers(1, 3000, (200, 2)), (448, 448), (896, 448), (635, 635), (20, 400)]:
        for most in (1, 6, 12):
            expected = get_optimal_tiled_canvas((int(height), int(width)), (448, 448), 1, most)
            assert tiles((int(width), int(height)), 448, 1, most) == expected


def test_boxes(pair):
    rule = pair[2].checkpoint.rule
    transform = rule.transform((200, 100))
    assert isinstance(transform, Transform)
    written = rule.write_box(Box((20, 10, 100, 50)), transform)
    assert written == "<box>[[100, 100, 500, 500]]</box>"
    found = rule.parse(f"a <ref>dog</ref>{written} here", [transform])
    assert found == [Text("a <ref>dog</ref>"), Box((20.0, 10.0, 100.0, 50.0)), Text(" here")]
