"""Qwen2-VL from messages: pictures of any size, tokens and answers against transformers.

Its processor as a whole needs torchvision, so the reference is put together from its tokenizer, template and image
processor, with the one step in between, as many media tokens as a picture has, written here.
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

import mm_jax  # noqa: E402
from mm_jax.data.messages import Box, Text  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity.checks import compiled  # noqa: E402
from tests.parity.record import note  # noqa: E402

MEDIA = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = hosts.CHATML.replace(
    "{{ '<' + part.type + '>' }}", "{{ '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}"
)
CONVERSATIONS = [
    hosts.messages([hosts.picture(60, 31), "what is in the picture?"]),
    hosts.messages([hosts.picture(17, 90, "L"), hosts.picture(33, 33, "P"), "compare"], "a red circle",
                   ["and now?", hosts.picture(24, 24, "RGBA")]),
    hosts.messages("no picture at all"),
]  # fmt: skip


def build(directory):
    """A checkpoint with everything, as transformers writes it: (model, tokenizer, image processor)."""
    tokenizer = hosts.byte_level(*MEDIA)
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen2VLConfig(
        text_config=theirs.TEXT
        | dict(
            vocab_size=len(tokenizer) + 3,
            max_position_embeddings=512,
            rope_parameters=dict(rope_theta=10_000.0, rope_type="default", mrope_section=[1, 2, 1]),
        ),
        vision_config=dict(depth=2, embed_dim=24, hidden_size=32, num_heads=3, patch_size=4, mlp_ratio=2),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    model = theirs.build(config, directory, "Qwen2VLForConditionalGeneration")
    tokenizer.save_pretrained(directory)
    images = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=16 * 16, max_pixels=40 * 40)
    images.save_pretrained(directory)
    return model, tokenizer, images


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen2_vl")
    return *build(directory), mm_jax.load(directory)


def their_arrays(tokenizer, images, conversation) -> dict[str, np.ndarray]:
    pictures = [p["image"] for m in conversation for p in m["content"] if p["type"] == "image"]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    arrays = dict(images(images=pictures, return_tensors="np")) if pictures else {}
    first, *rest = text.split("<|image_pad|>")
    for grid, piece in zip(arrays.get("image_grid_thw", ()), rest, strict=True):
        first += "<|image_pad|>" * int(grid.prod() // 4) + piece
    ids = np.array([tokenizer(first)["input_ids"]])
    arrays |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if pictures:
        arrays["mm_token_type_ids"] = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).astype(int)
    return arrays


def test_pictures(pair):
    """Patches and grids of odd sizes and modes."""
    _, _, images, lm = pair
    for picture in hosts.pictures().values():
        expected = images(
            images=[picture.convert("RGB") if picture.mode != "I;16" else picture], return_tensors="np"
        )
        found = lm.preprocess(images=[picture])
        assert np.array_equal(found["image_grid_thw"], expected["image_grid_thw"])
        if picture.mode in (
            "RGB",
            "L",
            "P",
            "1",
            "CMYK",
        ):  # what is pasted on white is the loader's, tested there
            error = float(np.abs(found["pixel_values"] - expected["pixel_values"]).max())
            assert error < 1e-6
            note(lm.family, "preprocessing", error)


def test_tokens_and_logits(pair):
    model, tokenizer, images, lm = pair
    batch = lm.batch(messages=CONVERSATIONS)
    ours = np.asarray(compiled(lm)(lm.params, batch))
    for row, conversation in enumerate(CONVERSATIONS):
        arrays = their_arrays(tokenizer, images, conversation)
        real = batch["segment_ids"][row] > 0
        assert batch["tokens"][row][real].tolist() == arrays["input_ids"][0].tolist()
        given = lm.batch(**arrays)
        assert np.array_equal(batch["positions"][row][real], given["positions"][0])
        expected = theirs.logits(model, arrays)[0]
        assert 0.1 < expected.std() < 10 and np.abs(ours[row][real] - expected).max() < 1e-4


def test_answers(pair):
    model, tokenizer, images, lm = pair
    compared = 0
    for conversation in CONVERSATIONS:
        ids, margins = theirs.generate(model, their_arrays(tokenizer, images, conversation), 8)
        close = np.flatnonzero(margins[0] < 0.02)
        length = int(close[0]) if len(close) else 8
        if length:
            expected = tokenizer.decode(ids[0][:length], skip_special_tokens=True).strip()
            assert lm.chat(conversation, max_new_tokens=length) == expected
        compared += length
    assert compared >= 8


def test_boxes(pair):
    """0 to 1000 over the picture, whatever it was resized to."""
    rule = pair[3].processor.rule
    transform = rule.transform((400, 100))
    assert transform.size != (400, 100)
    box = Box((100.0, 10.0, 200.0, 50.0), 0)
    text = rule.write_box(box, transform)
    assert text == "<|box_start|>(250,100),(500,500)<|box_end|>"
    before, found = rule.parse(f"here {text}", [transform])
    assert before == Text("here ") and np.allclose(found.box, box.box)


def test_too_long_a_picture(pair):
    with pytest.raises(mm_jax.UserError, match="more than 200 times"):
        pair[3].preprocess(images=[np.zeros((1, 300, 3), np.uint8)])


def video_conversation(frames: int = 6, rate: float = 4.0) -> list[dict]:
    video = {"type": "video", "video": [hosts.picture(40, 30, seed=k) for k in range(frames)], "fps": rate}
    return [{"role": "user", "content": [video, {"type": "text", "text": "how many digits?"}]}]


def same_video(model, tokenizer, lm, conversation, written: str) -> None:
    """The tokens are those of the text with `written` for the video, and the logits those of the reference."""
    batch = lm.batch(messages=conversation)
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    whole = "<|vision_start|><|video_pad|><|vision_end|>"
    assert text.count(whole) == 1
    ids = np.array([tokenizer(text.replace(whole, written))["input_ids"]])
    real = batch["segment_ids"][0] > 0
    assert batch["tokens"][0][real].tolist() == ids[0].tolist()
    part = conversation[0]["content"][0]
    arrays = lm.preprocess(videos=[(part["video"], part["fps"])])
    arrays = {name: array for name, array in arrays.items() if name != "video_times"}
    arrays |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    arrays["mm_token_type_ids"] = 2 * (ids == tokenizer.convert_tokens_to_ids("<|video_pad|>"))
    ours = np.asarray(lm.apply(lm.params, batch))[0][real]
    assert np.abs(ours - theirs.logits(model, arrays)[0]).max() < 1e-4


def test_video(pair):
    """All frames of a video, two to a patch; its settings are those of pictures where there are no others."""
    model, tokenizer, _, lm = pair
    pad = "<|video_pad|>" * (3 * 4 * 5)
    same_video(model, tokenizer, lm, video_conversation(), f"<|vision_start|>{pad}<|vision_end|>")


def test_video_behind_its_times(tmp_path):
    """Qwen3-VL: two frames a second of ten at 4 Hz, each patch of two frames behind its time."""
    tokenizer = hosts.byte_level(*MEDIA)
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.Qwen3VLConfig(
        text_config=theirs.TEXT
        | dict(
            vocab_size=len(tokenizer) + 3,
            max_position_embeddings=512,
            rope_parameters=dict(rope_theta=10_000.0, rope_type="default", mrope_section=[2, 1, 1]),
            head_dim=8,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=24,
            intermediate_size=36,
            num_heads=3,
            patch_size=4,
            out_hidden_size=32,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    model = theirs.build(config, tmp_path, "Qwen3VLForConditionalGeneration")
    tokenizer.save_pretrained(tmp_path)
    settings = {"size": {"shortest_edge": 4 * 256, "longest_edge": 5 * 512}}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(settings))
    lm = mm_jax.load(tmp_path)
    conversation = video_conversation(10)
    thw = lm.preprocess(videos=[(conversation[0]["content"][0]["video"], 4.0)])["video_grid_thw"]
    assert thw.shape == (1, 3) and thw[0, 0] == 3  # five frames: 0, 2, 4, 7 and 9, the last twice
    pad = "<|vision_start|>" + "<|video_pad|>" * int(thw[0, 1] * thw[0, 2] // 4) + "<|vision_end|>"
    written = "".join(f"<{time} seconds>{pad}" for time in ("0.2", "1.4", "2.2"))
    same_video(model, tokenizer, lm, conversation, written)
