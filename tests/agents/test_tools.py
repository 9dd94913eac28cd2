"""Tool calls by literal example."""

import json

import pytest

from mm_jax.agents.tools import (
    STYLES,
    Call,
    functions_from_json,
    plain_messages,
    style_of,
    template_messages,
    write_call,
)
from mm_jax.errors import UserError

WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}


@pytest.mark.parametrize(
    ("style", "text", "rest", "calls"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", {"a": 1})]),
        (
            "hermes",
            'I look.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
            '<tool_call>{"name": "g", "arguments": {"b": "é"}}</tool_call>',
            "I look.",
            [("f", {}), ("g", {"b": "é"})],
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "", [("f", {})]),  # the end is a stop token
        ("hermes", "<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ("hermes", "no call", "no call", []),
        ("llama3", '{"name": "f", "parameters": {"a": [1]}}', "", [("f", {"a": [1]})]),
        ("llama3", '<|python_tag|>{"name": "f"}; {"name": "g", "parameters": {}}', "", [("f", {}), ("g", {})]),
        ("llama3", '{"colour": "red"}', '{"colour": "red"}', []),
        ("llama3", '{"name": "f", "parameters": {}} and more', '{"name": "f", "parameters": {}} and more', []),
        ("pythonic", "[f(a=1, b='x'), m.g(c=[True, None])]", "",
         [("f", {"a": 1, "b": "x"}), ("m.g", {"c": [True, None]})]),
        ("pythonic", "[f(open('/etc/passwd'))]", "[f(open('/etc/passwd'))]", []),
        ("pythonic", "[f(a=open('x'))]", "[f(a=open('x'))]", []),
        ("pythonic", "[4, 8, 20, 40]", "[4, 8, 20, 40]", []),
        ("pythonic", "[" * 5000, "[" * 5000, []),
    ],
)  # fmt: skip
def test_parsing(style, text, rest, calls):
    found_rest, found = STYLES[style].parse(text)
    assert found_rest == rest
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls


def test_what_may_be_shown_of_a_growing_answer():
    hermes, llama = STYLES["hermes"], STYLES["llama3"]
    text = 'Yes. <tool_call>{"name"'
    shown = [hermes.safe(text[:k]) for k in range(len(text) + 1)]
    assert shown[-1] == 5 and max(shown) == 5 and shown[5] == 5
    assert hermes.safe("a < b") == 5
    assert [llama.safe(text) for text in ("", "{", '{"name"', "<|py", "Yes. {")] == [0, 0, 0, 0, 6]


def test_a_written_call_is_read_again():
    call = Call("weather", '{"city": "Zürich"}')
    assert STYLES["hermes"].parse(write_call(call)) == ("", [call])
    assert STYLES["hermes"].parse_forced(write_call(call)) == ("", [call])
    assert STYLES["hermes"].parse_forced('<tool_call>\n{"name": "wea') == ('<tool_call>\n{"name": "wea', [])
    assert style_of("qwen2") is STYLES["hermes"] and style_of("llama") is STYLES["llama3"]


def test_messages_for_templates_without_tools():
    image = {"type": "image_url", "image_url": {"url": "data:..."}}
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call | {"id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": [image]},
    ]
    system, user, answer, result = plain_messages(messages, functions_from_json([WEATHER]))
    assert system["content"][0]["text"] == "be short" and '"name": "weather"' in system["content"][1]["text"]
    assert user == messages[1]
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    assert answer == {"role": "assistant", "content": [{"type": "text", "text": f"{written}\n{written}"}]}
    texts = [part.get("text") for part in result["content"]]
    assert result["role"] == "user" and result["content"][4] == image
    assert texts == [
        "<tool_response>\n",
        "rain",
        "\n</tool_response>",
        "<tool_response>\n",
        None,
        "\n</tool_response>",
    ]
    assert plain_messages(messages[1:2], []) == messages[1:2]
    read = template_messages(messages)
    assert read[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"} and read[3:] == messages[3:]
    with pytest.raises(UserError, match='no call has the id "c9"'):
        plain_messages([*messages[:3], {"role": "tool", "tool_call_id": "c9", "content": "x"}], [])


@pytest.mark.parametrize(
    "tools",
    [{}, [1], [{"type": "function"}], [{"type": "function", "function": {"name": "a b"}}], [WEATHER, WEATHER],
     [{"type": "function", "function": {"name": "f", "parameters": 3}}]],
)  # fmt: skip
def test_wrong_tools(tools):
    with pytest.raises(UserError):
        functions_from_json(tools)
