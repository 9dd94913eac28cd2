"""Chat JSON to conversations and back; every mistake names the sample."""

import numpy as np
import pytest

from mm_jax.data.media import decode_audio, decode_image
from mm_jax.data.messages import (
    Audio,
    BadSample,
    Box,
    Conversation,
    Image,
    Message,
    Region,
    Text,
    conversation_from_json,
    conversation_to_json,
    messages_from_json,
)


def ask(content, **extra):
    return {"id": "7", "messages": [{"role": "user", "content": content}], **extra}


def test_every_kind_of_part(tmp_path):
    obj = {
        "id": "7",
        "source": "scenes",
        "messages": [
            {"role": "system", "content": "be short"},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": 1, "regions": [{"label": "red circle", "box": [0, 1, 2, 3]}]},
                    {"type": "image", "image": 0},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                    {"type": "image", "path": "a.png"},
                    {"type": "audio", "audio": "a.wav", "regions": [{"label": "one", "box": [0.5, 1]}]},
                    {"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}},
                    {"type": "text", "text": "where?"},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "box", "box": [1, 2, 3, 4], "image": 1}],
                "task": "grounding",
            },
        ],
        "rejected": "nowhere",
    }
    assert conversation_from_json(obj, root=tmp_path, images=[b"first", b"second"]) == Conversation(
        (
            Message("system", (Text("be short"),)),
            Message(
                "user",
                (
                    Image(b"second", (Region("red circle", (0.0, 1.0, 2.0, 3.0)),)),
                    Image(b"first"),
                    Image("data:image/png;base64,AA=="),
                    Image(str(tmp_path / "a.png")),
                    Audio(str(tmp_path / "a.wav"), None, (Region("one", (0.5, 1.0)),)),
                    Audio(b"RIF"),
                    Text("where?"),
                ),
            ),
            Message("assistant", (Box((1.0, 2.0, 3.0, 4.0), 1),), "grounding"),
        ),
        "7",
        "scenes",
        (Text("nowhere"),),
    )


def test_placeholders_take_listed_media_in_order():
    conversation = conversation_from_json(
        ask("<image>\nand <image> with <audio>?", images=["a.png", "b.png"], audio=["c.wav"])
    )
    assert conversation.messages[0].parts == (
        Image("a.png"),
        Text("and "),
        Image("b.png"),
        Text(" with "),
        Audio("c.wav"),
        Text("?"),
    )


def test_parts_without_a_picture_take_the_next_listed():
    conversation = conversation_from_json(
        ask([{"type": "image"}, {"type": "text", "text": "?"}], images=["a"])
    )
    assert conversation.messages[0].parts == (Image("a"), Text("?"))


def test_without_a_list_a_placeholder_is_plain_text():
    assert conversation_from_json(ask("is <image> a tag?")).messages[0].parts == (Text("is <image> a tag?"),)


@pytest.mark.parametrize(
    ("obj", "reason", "text"),
    [
        (
            ask("<image> <image>", images=["a"]),
            "placeholder_mismatch",
            'sample "7": 2 <image> placeholders but 1 image',
        ),
        (ask("?", images=["a", "b"]), "placeholder_mismatch", "0 <image> placeholders but 2 images"),
        (ask("<audio>", audio=[]), "placeholder_mismatch", "1 <audio> placeholder but 0 audio"),
        (ask([{"type": "image", "image": 0}]), "placeholder_mismatch", "image 0 asked for, but there are 0"),
        (ask([{"type": "image"}]), "placeholder_mismatch", 'the part of type "image" has no image'),
        ({"messages": []}, "empty_conversation", "sample: the conversation is empty"),
        ({"id": "7"}, "bad_conversation", 'needs "messages"'),
        (
            {"messages": [{"role": "asistant", "content": ""}]},
            "bad_conversation",
            'unknown role "asistant"; did you mean "assistant"?',
        ),
        (ask([{"type": "imag"}]), "bad_conversation", 'part type "imag"; did you mean "image"?'),
        (
            ask("?", mesages=1),
            "bad_conversation",
            'key "mesages" in a conversation; did you mean "messages"?',
        ),
        (ask(None), "bad_conversation", "content must be a string or a list of parts"),
        (ask([{"type": "text"}]), "bad_conversation", "needs"),
        (ask([{"type": "box", "box": [1, 2, 3]}]), "bad_box", "4 finite numbers"),
        (ask([{"type": "box", "box": [1, 2, 3, float("nan")]}]), "bad_box", "4 finite numbers"),
        (
            ask([{"type": "audio", "audio": "a", "regions": [{"label": "x", "box": [1, 2, 3, 4]}]}]),
            "bad_box",
            "2 finite",
        ),
        (ask([{"type": "input_audio", "input_audio": {"data": "?"}}]), "unreadable_audio", "base64"),
        (ask("?", rejected=[{"type": "image", "image": "a"}]), "bad_conversation", "text and boxes only"),
        ("text", "bad_conversation", "a JSON object, not str"),
    ],
)
def test_mistakes(obj, reason, text):
    with pytest.raises(BadSample, match="^[^\n]*$") as error:
        conversation_from_json(obj)
    assert text in str(error.value)
    assert error.value.reason == reason


def test_a_given_picture_that_no_message_shows_is_a_mistake():
    with pytest.raises(BadSample, match="1 of 2 images are in a message"):
        conversation_from_json(ask([{"type": "image", "image": 0}]), images=[b"a", b"b"])


def test_json_round_trip():
    conversation = Conversation(
        (
            Message("user", (Image("a.png", (Region("cat", (0.0, 0.0, 1.0, 1.0)),)), Text("<image>?"))),
            Message("user", (Audio("a.wav", 8000), Text("and?"))),
            Message("assistant", (Text("yes"),), "exists"),
        ),
        "3",
        "pets",
        (Text("no "), Box((0.0, 0.0, 1.0, 2.0))),
    )
    assert conversation_from_json(conversation_to_json(conversation)) == conversation


def test_arrays_become_files_that_hold_the_same():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    samples = np.linspace(-0.5, 0.5, 100, dtype=np.float32)
    parts = (Image(pixels), Audio(samples, 16000))
    obj = conversation_to_json(Conversation((Message("user", parts),)))
    image, audio = conversation_from_json(obj).messages[0].parts
    np.testing.assert_array_equal(np.asarray(decode_image(image.source)), pixels)
    np.testing.assert_array_equal(decode_audio(audio.source, 16000), samples)


def test_prompts_may_be_json_or_messages():
    message = Message("user", (Text("hi"),))
    assert (
        messages_from_json([{"role": "user", "content": "hi"}]) == messages_from_json([message]) == (message,)
    )
