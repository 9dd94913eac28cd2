"""How each family writes boxes, and what its answers mean in pixels of the original picture."""

import numpy as np
import PIL.Image
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from mm_jax.data.chat_template import ChatTemplate
from mm_jax.data.grounding import GroundedImage
from mm_jax.data.joined_rule import JoinedRule
from mm_jax.data.media_rule import FixedImage, Settings
from mm_jax.data.messages import Box, Image, Message, Text
from mm_jax.data.native_rule import NativeRule
from mm_jax.data.patches import PatchLayout
from mm_jax.data.pretrained import PretrainedProcessor
from mm_jax.data.pretrained_tokenizer import PretrainedTokenizer
from mm_jax.evaluate.draw import ANSWER, draw_boxes
from mm_jax.families.internvl import TileRule
from mm_jax.families.llava import SquareBoxes
from mm_jax.families.paligemma import LocatedImage
from mm_jax.families.qwen import PathRule
from mm_jax.families.qwen2_5_vl import BOXES as JSON
from mm_jax.families.qwen2_vl import BOXES as PAIRS
from mm_jax.families.qwen2_vl import IMAGE_PROCESSOR
from mm_jax.inference.text import TextStream, render

SIZE = (640, 320)
CROP = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": 3,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
SQUARE = {
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
FIXED = dict(token_id=0, size=(224, 224), num_tokens=4)
NATIVE = NativeRule(
    Settings(image={}), tokens={"image": 0, "video": None}, layout=PatchLayout(2, 0, 0), patch=14, frames=2, axes=True,
    defaults=IMAGE_PROCESSOR, video_defaults={}, boxes=PAIRS,
)  # fmt: skip
RULES = {
    # of the 640 x 640 square, with 160 rows of padding above, whatever is cropped for the tower
    "llava": (SquareBoxes(Settings(image=CROP), **FIXED), "[0.25, 0.50, 0.75, 0.75]"),
    "internvl": (TileRule(Settings(image=SQUARE), **FIXED), "<box>[[250, 500, 750, 1000]]</box>"),
    "qwen": (PathRule(Settings(), start=0, size=(224, 224), queries=4), "<box>(250,500),(750,999)</box>"),
    "qwen2_vl": (NATIVE, "<|box_start|>(250,500),(750,1000)<|box_end|>"),
    "parts": (
        JoinedRule({"image": FixedImage(Settings(image=SQUARE), **FIXED)}, {"image": "<image>"}),
        "[250, 500, 750, 1000]",
    ),
    "paligemma": (LocatedImage(Settings(image=SQUARE), **FIXED), "<loc0512><loc0256><loc1023><loc0768>"),
    "kosmos-2": (
        GroundedImage(Settings(image=SQUARE), **FIXED),
        "<object><patch_index_0520><patch_index_1015></object>",
    ),
}
BOX = (160.0, 160.0, 480.0, 320.0)


@pytest.mark.parametrize("name", RULES)
def test_written_and_read(name):
    rule, text = RULES[name]
    transform = rule.transform(SIZE)
    assert rule.write_box(Box(BOX), transform) == text
    # the last 1024th (1000th) of a picture has no number, and Kosmos-2's boxes end in the middle of their cells
    off = {"paligemma": 640 / 1024, "qwen": 640 / 1000, "kosmos-2": 10.1}.get(name, 1e-6)
    before, found, after = rule.parse(f"a dog {text} here", [transform])
    assert (before, after) == (Text("a dog"), Text(" here")) or (before, after) == (
        Text("a dog "),
        Text(" here"),
    )
    assert np.abs(np.subtract(found.box, BOX)).max() <= off and found.image == 0
    assert "".join(part.text for part in rule.parse(f"a dog {text} here", [])).startswith("a dog ")


def test_qwen():
    """0 to 1000, and pixels of what the model sees, in JSON."""
    from mm_jax.data.image import Transform

    seen = Transform(SIZE, (0.7, 0.7), (0, 0), (448, 224))
    text = "<|box_start|>(250,500),(750,1000)<|box_end|>"
    (box,) = PAIRS.parse(text, [seen])
    assert PAIRS.write(Box(BOX), seen) == text and box.box == pytest.approx(BOX)
    answer = '[{"bbox_2d": [112, 112, 336, 224], "label": "dog"}]'
    assert JSON.write(Box(BOX), seen) in answer
    before, box, after = JSON.parse(answer, [seen])
    assert (before, after) == (Text("[{"), Text(', "label": "dog"}]'))
    assert box.box == pytest.approx(BOX)


def test_llava_outside_the_picture():
    """A box that reaches into the padding ends at the picture; other lists of numbers are no boxes."""
    rule, _ = RULES["llava"]
    (box,) = rule.parse("[0.0, 0.1, 1.0, 1.0]", [rule.transform(SIZE)])
    assert box.box == (0.0, 0.0, 640.0, 320.0)
    text = "scores [1, 2, 3, 4] and [0.5, 0.25]"
    assert rule.parse(text, [rule.transform(SIZE)]) == [Text(text)]


def processor(name: str) -> PretrainedProcessor:
    """With a tokenizer of characters whose location tokens and tags are special, as in some files."""
    rule, text = RULES[name]
    tags = ["<pad>", "<s>", "</s>", "<image>", "</image>", "<img>", "</img>", "<box>", "</box>", "<object>",
            "</object>", "<|box_start|>", "<|box_end|>"]  # fmt: skip
    tags += [f"<loc{k:04d}>" for k in range(1024)] + [f"<patch_index_{k:04d}>" for k in range(1024)]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz 0123456789[](),.?\n"))
    backend = tokenizers.Tokenizer(
        models.WordLevel({c: k for k, c in enumerate([*tags, *letters])}, unk_token="<pad>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(tags)
    tokenizer = PretrainedTokenizer(
        backend, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    )
    rule.tokens = {"image": tokenizer.id("<image>")}
    placeholder = rule.placeholders.get("image", "<image>")
    template = (
        f"{{% set picture = '{placeholder}' %}}"
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{{ picture if p['type'] == 'image' else p['text'] }}"
        "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    )
    return PretrainedProcessor(
        tokenizer, ChatTemplate(template, tokenizer.named), rule, pad_id=0, stop_ids=(2,)
    )


@pytest.mark.parametrize("name", RULES)
def test_answers(name):
    """Special tokens of boxes are read, a stream never takes anything back, and the next turn writes the same text."""
    made, text = processor(name), RULES[name][1]
    picture = PIL.Image.new("RGB", SIZE)
    question = Message("user", (Image(picture), Text("where is the dog?")))
    example = made.prompt([question])
    answer = f"the dog {text} is here"
    ids = made.tokenizer.encode(answer)
    parts = made.parts(ids, example.transforms)
    assert [type(part) for part in parts] == [Text, Box, Text]
    stream, shown = TextStream(made, example.transforms), ""
    for token in ids:
        shown += stream.push([token])
    shown += stream.finish()
    rounded = ", ".join(str(round(v)) for v in parts[1].box)
    assert shown == f"the dog [{rounded}] is here"
    again = made.prompt([question, Message("assistant", tuple(parts)), Message("user", (Text("and now?"),))])
    said = made.tokenizer.decode(again.tokens, special=True)
    assert text in said and "is here\nand now?" in said
    drawn = np.asarray(draw_boxes(picture, [(part.box, ANSWER) for part in parts if isinstance(part, Box)]))
    rows, columns = np.nonzero((drawn == ANSWER).all(axis=-1))
    corners = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.subtract(corners, BOX)).max() <= 11


@pytest.mark.parametrize("name", RULES)
def test_streams_of_several_boxes(name):
    """Side by side, with a comma between them, and at the end."""
    made, text = processor(name), RULES[name][1]
    transforms = [made.rule.transform(SIZE)]
    for answer in (f"{text}{text} and {text}", f"at {text}, {text},{text}. no"):
        ids = made.tokenizer.encode(answer)
        stream = TextStream(made, transforms)
        shown = "".join([stream.push([token]) for token in ids]) + stream.finish()
        parts = made.parts(ids, transforms)
        assert sum(isinstance(part, Box) for part in parts) == 3
        assert shown == render(parts)
