"""Conversations to arrays by literal example, answers back, and every sample that must be dropped."""

import dataclasses
import io
import json
import pickle

import numpy as np
import PIL.Image
import pytest
import soundfile

from mm_jax.data.audio import AudioRule
from mm_jax.data.image import ImageRule
from mm_jax.data.messages import Audio, BadSample, Box, Conversation, Image, Message, Region, Text
from mm_jax.data.processor import Processor, ProcessorConfig, TargetRule, fit_processor
from mm_jax.errors import UserError


def png(width, height) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (255, 255, 255)).save(buffer, "PNG")
    return buffer.getvalue()


def wav(seconds) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).normal(size=round(seconds * 16000)) * 0.1
    soundfile.write(buffer, noise, 16000, "PCM_16", format="WAV")
    return buffer.getvalue()


def user(*parts) -> Message:
    return Message("user", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def assistant(*parts) -> Message:
    return Message("assistant", tuple(Text(p) if isinstance(p, str) else p for p in parts))


def talk(*messages, **fields) -> Conversation:
    return Conversation(messages, **fields)


CONFIG = ProcessorConfig(
    image=ImageRule(height=32, width=32, num_tokens=2),
    audio=AudioRule(max_frames=16, num_tokens=2, frames_per_token=8),
    targets=TargetRule(box_bins=8, image_grid=(2, 2), audio_positions=4),
    box_bins=4,
)
WIDE = Image(png(64, 32), (Region("red circle", (0, 0, 32, 32)),))
WORD = Audio(wav(0.25), None, (Region("one", (0.0, 0.1)),))  # 25 frames: windows of 16 and 9


@pytest.fixture(scope="module")
def processor():
    text = ["a", "b", "c"]
    return fit_processor(CONFIG, [talk(user(WIDE, WORD, *text), assistant("yes"))] * 3, 300)


def ids(processor, text):
    """Names of tokens, separated by spaces, to ids."""
    names = {"P": "<|pad|>", "S": "<|system|>", "U": "<|user|>", "A": "<|assistant|>", ".": "<|end|>"}
    names |= {"I": "<image>", "W": "<audio>"} | {str(k): f"<loc_{k}>" for k in range(4)}
    # a word carries the space before it, see `spaced`
    return [processor.tokenizer.id(names.get(name, f"Ġ{name}")) for name in text.split()]


def test_text_by_literal_example(processor):
    example = processor.example(
        talk(user("a"), assistant("b"), user("c"), assistant("yes"), id="7", source="x")
    )
    assert example.tokens.tolist() == ids(processor, "U a . A b . U c . A yes .")
    assert example.loss_weights.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    assert example.segments.tolist() == [1] * 12
    assert example.positions.tolist() == list(range(12))
    assert example.image_index.tolist() == example.audio_index.tolist() == [-1] * 12
    assert example.pixel_values.shape == (0, 32, 32, 3)
    assert example.audio_values.shape == (0, 16, 80)
    assert (example.id, example.source, example.preference) == ("7", "x", -1)
    dtypes = {f.name: getattr(example, f.name).dtype for f in dataclasses.fields(example)[:9]}
    floats = {"loss_weights", "pixel_values", "audio_values"}
    assert all(dtype == (np.float32 if name in floats else np.int32) for name, dtype in dtypes.items())


@pytest.mark.parametrize(("name", "power"), [("token", 0), ("sqrt", -0.5), ("answer", -1)])
def test_answer_weights(processor, name, power):
    config = dataclasses.replace(processor.config, answer_weight=name)
    example = Processor(config, processor.tokenizer).example(talk(user("a"), assistant("b c a"), user("a")))
    n = int((example.loss_weights > 0).sum())
    assert n >= 4
    assert example.loss_weights.max() == pytest.approx(n**power)


def test_media_by_literal_example(processor):
    example = processor.example(talk(user(WIDE, "a", WORD, Image(png(32, 64))), assistant("b")))
    assert example.tokens.tolist() == ids(processor, "U I I a W W W W I I . A b .")
    assert example.image_index.tolist() == [-1, 0, 1, -1, -1, -1, -1, -1, 2, 3, -1, -1, -1, -1]
    assert example.audio_index.tolist() == [-1, -1, -1, -1, 0, 1, 2, 3, -1, -1, -1, -1, -1, -1]
    assert example.pixel_values.shape == (2, 32, 32, 3)
    assert [t.offset for t in example.transforms] == [(0, 8), (8, 0)]
    assert example.audio_values.shape == (2, 16, 80)
    assert example.audio_frames.tolist() == [16, 9]


def test_a_short_window_takes_few_tokens(processor):
    example = processor.example(talk(user(Audio(wav(0.2)), Audio(wav(0.05))), assistant("b")))
    # 20 frames: 16 and 4, so 2 and 1 tokens; 5 frames: 1 token. A window has room for 2
    assert example.audio_frames.tolist() == [16, 4, 5]
    assert example.audio_index.tolist() == [-1, 0, 1, 2, 4, -1, -1, -1, -1]


def test_boxes_there_and_back(processor):
    # 64 x 32 into 32 x 32: halved, 8 rows above; 4 bins of 8 pixels
    conversation = talk(user(WIDE, "a"), assistant(Box((16.0, 0.0, 48.0, 30.0)), "b"))
    example = processor.example(conversation)
    assert example.tokens.tolist() == ids(processor, "U I I a . A 1 1 3 2 b .")
    answer = example.tokens[example.loss_weights > 0]
    box, text = processor.parts(answer, example.transforms)
    assert box == Box((24.0, 8.0, 56.0, 24.0))  # the middles of the bins
    assert text == Text(" b")
    assert processor.text(answer, example.transforms) == "[24, 8, 56, 24] b"
    assert processor.text(answer) == "<loc_1><loc_1><loc_3><loc_2> b"
    assert processor.text(answer[:3], example.transforms) == "<loc_1><loc_1><loc_3>"


def test_language_training_leaves_media_out_but_writes_boxes(processor):
    conversation = talk(user(WIDE, WORD, "a"), assistant(Box((16.0, 0.0, 48.0, 30.0))))
    example = processor.example(conversation, media=False)
    assert example.tokens.tolist() == ids(processor, "U a . A 1 1 3 2 .")
    assert example.num_images == example.num_audio == 0


def test_dense_training_keeps_only_media(processor):
    example = processor.example(talk(user(WIDE, "a", WORD), assistant("b")), text=False, targets=True)
    assert example.tokens.tolist() == ids(processor, "I I W W W W")
    assert not example.loss_weights.any()
    assert processor.config.targets.labels == ("_centre", "circle", "one", "red")
    # the red circle fills the left half of rows 8 to 24; its middle is on the edge of the lower patch
    assert example.image_labels.tolist() == [[[0, 1, 0, 1], [0] * 4, [1, 1, 0, 1], [0] * 4]]
    assert example.image_boxes.tolist() == [[[0, 2, 4, 6], [-1] * 4, [0, 2, 4, 6], [-1] * 4]]
    assert example.audio_labels[:, :, 2].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert example.audio_labels.shape == (2, 4, 4)


def test_names_of_media_tokens(processor):
    """The first token of a label's name at every token whose patches or frames carry the label."""
    config = dataclasses.replace(
        CONFIG, targets=dataclasses.replace(processor.config.targets, image_block=(2, 1))
    )
    conversation = talk(user(WIDE, WORD, "a"), assistant("b"))
    example = Processor(config, processor.tokenizer).example(conversation, names=True)
    red, circle, one = (processor.tokenizer.encode(word)[0] for word in (" red", " circle", " one"))
    said = {k: {int(i) for i in row if i >= 0} for k, row in enumerate(example.names)}
    # The picture is padded above and below and the circle is its left half: of two tokens, each a column of patches,
    # the first shows it. The word of 0.1 s is heard at two of the four positions of the first window: its first token.
    image, audio = np.flatnonzero(example.image_index >= 0), np.flatnonzero(example.audio_index >= 0)
    assert [said[k] for k in image] == [{red, circle}, set()]
    assert [said[k] for k in audio] == [{one}, set(), set(), set()]
    assert not any(said[k] for k in said if k not in {*image, *audio})
    assert example.image_labels is None


def test_preference_pairs_share_their_media(processor):
    conversation = talk(user(WIDE, "a"), assistant("b"), user("c"), assistant("yes"), rejected=(Text("a"),))
    config = dataclasses.replace(processor.config, answer_weight="sqrt")
    example = Processor(config, processor.tokenizer).example(conversation)
    segment = "U I I a . A b . U c . A"
    assert example.tokens.tolist() == ids(processor, f"{segment} yes . {segment} a .")
    assert example.segments.tolist() == [1] * 14 + [2] * 14
    assert example.positions.tolist() == [*range(14), *range(14)]
    assert example.loss_weights.tolist() == ([0] * 12 + [1, 1]) * 2
    assert example.image_index.tolist() == ([-1, 0, 1] + [-1] * 11) * 2
    assert example.num_images == 1


def test_prompt_is_the_beginning_of_the_example(processor):
    messages = (user(WIDE, "a"), assistant("b"), user("c"), assistant("yes"))
    prompt, example = processor.prompt(messages[:3]), processor.example(talk(*messages))
    assert prompt.tokens.tolist() == example.tokens[: prompt.length].tolist()
    assert prompt.tokens.tolist() == ids(processor, "U I I a . A b . U c . A")
    assert not prompt.loss_weights.any()
    assert prompt.num_images == 1
    assert processor.stop_ids == tuple(ids(processor, "."))
    assert [processor.pad_id] == ids(processor, "P")


GOOD = talk(user(WIDE, "a"), assistant("b"))


@pytest.mark.parametrize(
    ("conversation", "reason", "text"),
    [
        (talk(id="9"), "empty_conversation", 'sample "9": the conversation is empty'),
        (talk(user("a")), "no_trainable_token", "no assistant message to train on"),
        (talk(user("a"), assistant(" ")), "empty_answer", "an assistant message is empty"),
        (
            talk(user("a"), assistant(Box((0, 0, 1, 1)))),
            "placeholder_mismatch",
            "image 0, but there are 0 images",
        ),
        (talk(user(WIDE), assistant(Box((0, 0, 9, 9), 1))), "placeholder_mismatch", "image 1"),
        (
            talk(user(WIDE), assistant(Box((9, 9, 0, 0)))),
            "bad_box",
            "[9, 9, 0, 0] is empty or outside its 64 x 32",
        ),
        (talk(user(WIDE), assistant(Box((64, 0, 70, 9)))), "bad_box", "outside"),
        (talk(user(Image(b"x"), "a"), assistant("b"), id="9"), "unreadable_image", 'sample "9": image 0: '),
        (talk(user(WIDE, Image(b""), "a"), assistant("b")), "unreadable_image", "image 1: "),
        (talk(user(Image("no.png"), "a"), assistant("b")), "missing_file", "no.png"),
        (talk(user(Image(png(8000, 8000)), "a"), assistant("b")), "image_bomb", "8000 x 8000"),
        (talk(user(Audio(wav(0)), "a"), assistant("b")), "unreadable_audio", "audio 0: "),
        (talk(user(Audio(np.zeros(9)), "a"), assistant("b")), "bad_sample_rate", "audio 0: "),
        (talk(user("a"), rejected=(Text("b"),)), "no_trainable_token", "must end with an assistant"),
        (dataclasses.replace(GOOD, rejected=(WIDE,)), "bad_conversation", "text and boxes only"),
    ],
)
def test_bad_samples(processor, conversation, reason, text):
    with pytest.raises(BadSample, match="^[^\n]*$") as error:
        processor.example(conversation)
    assert error.value.reason == reason
    assert text in str(error.value)


def test_bad_samples_of_other_kinds(processor):
    def reason(call, *args, **options):
        with pytest.raises(BadSample) as error:
            call(*args, **options)
        return error.value.reason

    assert reason(processor.example, talk(user("a"), assistant("b")), text=False) == "no_media"
    assert reason(processor.prompt, GOOD.messages) == "bad_conversation"
    assert reason(processor.prompt, ()) == "empty_conversation"
    blind = Processor(dataclasses.replace(processor.config, image=None, audio=None), processor.tokenizer)
    assert reason(blind.example, GOOD) == "no_encoder"
    assert reason(blind.example, talk(user(WORD), assistant("b"))) == "no_encoder"
    assert blind.example(GOOD, media=False).length == 6


def test_pickle_and_save(processor, tmp_path):
    processor.save(tmp_path)
    conversation = talk(user(WIDE, WORD, "a"), assistant("b"))
    expected = processor.example(conversation, targets=True)
    for other in (pickle.loads(pickle.dumps(processor)), Processor.load(tmp_path)):
        assert other.config == processor.config
        assert other.vocab_size == processor.vocab_size
        found = other.example(conversation, targets=True)
        for field in dataclasses.fields(found):
            np.testing.assert_equal(getattr(found, field.name), getattr(expected, field.name))


def test_damaged_directories(processor, tmp_path):
    processor.save(tmp_path)
    path = tmp_path / "processor.json"
    obj = json.loads(path.read_text())
    obj["image"]["hight"] = 3
    path.write_text(json.dumps(obj))
    with pytest.raises(UserError, match='unknown field "hight"; did you mean "height"'):
        Processor.load(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Processor.load(tmp_path)
    with pytest.raises(UserError, match="cannot read the processor"):
        Processor.load(tmp_path / "no")
    with pytest.raises(UserError, match="no token <loc_7>"):
        Processor(dataclasses.replace(CONFIG, box_bins=8), processor.tokenizer)
    with pytest.raises(UserError, match="answer_weight"):
        ProcessorConfig(answer_weight="mean")


def test_fitting_is_deterministic():
    conversations = [talk(user(WIDE, f"text {k}"), assistant("b")) for k in range(9)]
    first, second = (fit_processor(CONFIG, iter(conversations), 310) for _ in range(2))
    assert first.config == second.config
    assert first.config.targets.labels == ("_centre", "circle", "red")
    assert first.tokenizer.backend.to_str() == second.tokenizer.backend.to_str()
    given = dataclasses.replace(CONFIG, targets=TargetRule(labels=("red",)))
    assert fit_processor(given, conversations, 310).config.targets.labels == ("red",)
