"""The official client drives everything that the API offers."""

import json
import time

import numpy as np
import openai
import pytest

from mm_jax.data.media import decode_image
from mm_jax.inference.attention import looks, words_of
from mm_jax.inference.sampling import Sampling
from tests.serve.conftest import audio_part, image_part, text_part

MODEL = "tiny"
ASK = [{"role": "user", "content": "how many"}]


def chat(client, messages=ASK, **options):
    return client.chat.completions.create(
        model=MODEL, messages=messages, **{"max_tokens": 8, "temperature": 0} | options
    )


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.list().data[0].object == "model"


@pytest.mark.parametrize(
    "content",
    [
        "how many",
        [image_part(0), text_part("what colour")],
        [image_part(1), image_part(2), text_part("which")],
        [audio_part(1), text_part("which word")],
        [image_part(0), audio_part(0), image_part(1), text_part("is it")],
    ],
)
def test_answers_are_those_of_python(client, lm, content):
    """The same text as `lm.chat`, whole and streamed, with its length."""
    messages = [{"role": "user", "content": content}]
    whole = chat(client, messages)
    assert whole.choices[0].message.content == lm.chat(messages, 8)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.prompt_tokens == lm.prompt(messages).length and whole.usage.completion_tokens == 8
    pieces = list(chat(client, messages, stream=True, stream_options={"include_usage": True}))
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole.choices[0].message.content
    assert sum(bool(p.choices and p.choices[0].delta.content) for p in pieces) > 1
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage.completion_tokens == 8 and not pieces[-1].choices


def test_conversations(client, lm):
    messages = [
        {"role": "system", "content": "one two"},
        {"role": "user", "content": [image_part(0), text_part("what colour")]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "how many"},
    ]
    assert chat(client, messages).choices[0].message.content == lm.chat(messages, 8)


def test_the_next_turn_is_read_from_where_it_differs(client):
    messages = [
        {"role": "user", "content": [image_part(3), text_part("what colour is the square in the picture")]}
    ]
    first = chat(client, messages)
    assert first.usage.prompt_tokens_details.cached_tokens < 4 < first.usage.prompt_tokens
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    after = chat(client, [*messages, answer, {"role": "user", "content": "how many"}])
    assert after.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_seed_and_n(client, lm):
    first = chat(client, n=2, seed=5, temperature=1.5, top_p=0.9)
    again = chat(client, n=2, seed=5, temperature=1.5, top_p=0.9)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1] and texts[0] != texts[1]
    assert [choice.message.content for choice in again.choices] == texts
    assert texts[0] == lm.chat(ASK, 8, Sampling(1.5, top_p=0.9, seed=5))
    assert first.usage.completion_tokens == 16
    streamed = {0: "", 1: ""}
    for piece in chat(client, n=2, seed=5, temperature=1.5, top_p=0.9, stream=True):
        streamed[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert list(streamed.values()) == texts
    assert chat(client, seed=6, temperature=1.5).choices[0].message.content != texts[0]


def test_stop(client):
    whole = chat(client, max_tokens=20).choices[0].message.content
    stop = whole[5:8]
    cut = chat(client, max_tokens=20, stop=[stop, "\x00"]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    pieces = chat(client, max_tokens=20, stop=stop, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == cut.message.content


def test_logprobs(client):
    found = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(found) == 8
    for token in found:
        assert len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob <= 0
        assert token.token == token.top_logprobs[0].token  # greedy
    streamed = []
    for piece in chat(client, logprobs=True, stream=True):
        if piece.choices[0].logprobs:
            streamed += piece.choices[0].logprobs.content
    assert [t.token for t in streamed] == [t.token for t in found]
    assert streamed[0].top_logprobs == []


def test_penalties_and_bias(client):
    plain = chat(client, max_tokens=60).choices[0].message.content
    extra = {"repetition_penalty": 1.8, "min_p": 0.01, "top_k": 40}
    changed = (
        chat(client, max_tokens=60, frequency_penalty=2, presence_penalty=2, extra_body=extra)
        .choices[0]
        .message.content
    )
    assert changed != plain
    biased = chat(client, logit_bias={"200": 100}, logprobs=True).choices[0]
    assert len({token.token for token in biased.logprobs.content}) == 1


def test_json_schema(client):
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "seen", "schema": schema, "strict": True}}
    messages = [{"role": "user", "content": [image_part(0), text_part("what")]}]
    answers = chat(client, messages, response_format=form, temperature=1, n=4, max_tokens=100, seed=3)
    for choice in answers.choices:
        found = json.loads(choice.message.content)
        assert (
            found["colour"] in ("red", "blue") and 0 <= found["count"] <= 9 and choice.finish_reason == "stop"
        )
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        chat(
            client,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nothing"}},
            },
        )


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "looks at a place",
            "parameters": {
                "type": "object",
                "properties": {"place": {"enum": ["left", "right"]}},
                "required": ["place"],
                "additionalProperties": False,
            },
        },
    }
]


def test_tool_call_round_trip(client, lm):
    """The call is forced, as random weights call nothing; its result, with a picture, goes back in."""
    answer = chat(client, tools=TOOLS, tool_choice="required", max_tokens=200, temperature=1, seed=1).choices[
        0
    ]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.function.name == "look" and json.loads(call.function.arguments)["place"] in ("left", "right")
    streamed = {"name": "", "arguments": "", "text": "", "finish": None}
    options = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}}
    for piece in chat(client, **options, max_tokens=200, temperature=1, seed=1, stream=True):
        delta = piece.choices[0].delta
        streamed["text"] += delta.content or ""
        for part in delta.tool_calls or ():
            streamed["name"] += part.function.name or ""
            streamed["arguments"] += part.function.arguments or ""
        streamed["finish"] = piece.choices[0].finish_reason or streamed["finish"]
    assert streamed == {
        "name": "look", "arguments": call.function.arguments, "text": "", "finish": "tool_calls"
    }  # fmt: skip
    result = {"role": "tool", "tool_call_id": call.id, "content": [text_part("here it is"), image_part(1)]}
    messages = [*ASK, answer.message.model_dump(exclude_none=True), result]
    after = chat(client, messages, tools=TOOLS)
    assert after.choices[0].message.content and not after.choices[0].message.tool_calls
    # what the model has read: the functions, its own call and the result
    from mm_jax.agents.tools import functions_from_json, plain_messages

    assert after.usage.prompt_tokens == lm.prompt(plain_messages(messages, functions_from_json(TOOLS))).length


def test_where_it_looked(client, lm):
    """Weights over patches for every word, or for chosen ones with heat maps; streamed the same."""
    messages = [{"role": "user", "content": [image_part(0), image_part(1), text_part("what colour")]}]
    whole = chat(client, messages, max_tokens=12, extra_body={"attention": True}).choices[0].message
    words = whole.attention["words"]
    assert [word["index"] for word in words] == list(range(len(words)))
    assert all(whole.content[word["start"] : word["end"]] == word["text"] for word in words)
    assert "".join(word["text"] for word in words) == "".join(whole.content.split())
    prompt = lm.prompt(messages)
    ids = lm.generate(lm.batch(messages), 12)[0]
    tokens = words_of(lm.processor, ids, prompt.transforms)[1].tokens
    for look, image in zip(looks(lm, prompt, ids, [tokens])[0], words[1]["images"], strict=True):
        np.testing.assert_allclose(image["weights"], look.weights, rtol=0.01)
        np.testing.assert_allclose(image["area"], look.area, atol=0.01)
    chosen = {"attention": {"words": [1, 999], "pictures": True}}
    pieces = list(chat(client, messages, max_tokens=12, stream=True, extra_body=chosen))
    (streamed,) = [p.choices[0].delta.attention for p in pieces if hasattr(p.choices[0].delta, "attention")]
    (word,) = streamed["words"]
    assert [word["index"], word["text"]] == [1, words[1]["text"]]
    for image, expected in zip(word["images"], words[1]["images"], strict=True):
        heat = decode_image(image.pop("picture"))
        assert heat.size == (40, 24) and image == expected
    assert not hasattr(chat(client, messages).choices[0].message, "attention")


def test_completions(client, lm):
    found = client.completions.create(model=MODEL, prompt="how many", max_tokens=6, temperature=0, logprobs=2)
    assert found.choices[0].finish_reason == "length" and len(found.choices[0].logprobs.tokens) == 6
    ids = list(lm.processor.tokenizer.encode("how many"))
    same = client.completions.create(model=MODEL, prompt=ids, max_tokens=6, temperature=0, echo=True)
    assert same.choices[0].text == "how many" + found.choices[0].text
    several = client.completions.create(model=MODEL, prompt=["how many", "red"], max_tokens=3, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1]
    streamed = client.completions.create(
        model=MODEL, prompt="how many", max_tokens=6, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in streamed) == found.choices[0].text


EMBEDDED = [
    "how many circles are there",
    "red",
    [image_part(0)],
    [image_part(0), text_part("what colour")],
    [audio_part(1)],
]


def test_embeddings(client, lm, server):
    """The vectors of Python, packed (as the client asks by default) and not, together and alone."""
    packed = client.embeddings.create(model=MODEL, input=EMBEDDED)
    assert [each.index for each in packed.data] == list(range(len(EMBEDDED)))
    found = np.array([each.embedding for each in packed.data])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found, lm.embed(EMBEDDED), atol=1e-5)
    # unlike each other: the picture, and the text beside it, count
    likeness = found @ found.T - 2 * np.eye(len(found))
    assert likeness.max() < 0.999
    read = sum(lm.embedding_prompt(one).length for one in EMBEDDED)
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == read
    for one, vector in zip(EMBEDDED, found, strict=True):
        alone = client.embeddings.create(model=MODEL, input=one, encoding_format="float", dimensions=32)
        np.testing.assert_allclose(alone.data[0].embedding, vector, atol=1e-5)
    ids = list(lm.processor.tokenizer.encode("how many"))
    same = client.embeddings.create(model=MODEL, input=[ids, ids]).data
    np.testing.assert_allclose([each.embedding for each in same], lm.embed([ids, ids]), atol=1e-5)


def test_more_inputs_than_rows_and_queue(client, server):
    texts = [f"{k} circles" for k in range(30)]
    found = client.embeddings.create(model=MODEL, input=texts)
    assert len(found.data) == 30
    assert settled(server, "slots_used ", 0)
    one = client.embeddings.create(model=MODEL, input=texts[7]).data[0].embedding
    np.testing.assert_allclose(found.data[7].embedding, one, atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="32 numbers"):
        client.embeddings.create(model=MODEL, input="red", dimensions=16)


def settled(server, name: str, value: float) -> bool:
    limit = time.monotonic() + 60
    while server.metric(name) != value and time.monotonic() < limit:
        time.sleep(0.05)
    return server.metric(name) == value


def test_disconnecting_frees_the_slot(client, server):
    """Streams that are closed in the middle, and an answer that nobody waits for."""
    for _ in range(3):
        stream = chat(client, max_tokens=240, stream=True, extra_body={"ignore_eos": True})
        for _, piece in zip(range(3), stream, strict=False):
            assert piece.choices
        before = server.metric("generated_tokens")
        stream.close()
        assert settled(server, "slots_used ", 0)
        # it has ended early, and not by itself
        assert server.metric("generated_tokens") < before + 230
    impatient = client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        while True:  # a fast machine may answer in time
            chat(impatient, max_tokens=900, n=4, extra_body={"ignore_eos": True})
    assert settled(server, "slots_used ", 0)
    assert chat(client).choices[0].message.content
