"""InternVL from messages: tiles, tokens and answers against transformers."""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.data.image import Transform  # noqa: E402
from mm_jax.data.messages import Box, Text  # noqa: E402
from mm_jax.data.pieces import tiles  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402

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
        chat_template=hosts.CHATML.replace("'<' + part.type + '>'", "'<IMG_CONTEXT>'"),
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
