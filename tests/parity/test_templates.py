"""Tokenizer files and chat templates against transformers' apply_chat_template, for text alone."""

import json

import pytest

transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.data.chat_template import ChatTemplate, read_template  # noqa: E402
from mm_jax.data.media_rule import MediaRule  # noqa: E402
from mm_jax.data.messages import Message, Text  # noqa: E402
from mm_jax.data.pretrained import PretrainedProcessor  # noqa: E402
from mm_jax.data.pretrained_tokenizer import PretrainedTokenizer  # noqa: E402
from tests.parity import hosts  # noqa: E402

HEADERS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
# in the manner of Qwen2.5: tools, calls, their results in a user's turn
TOOLS = """
{%- if tools %}{{ '<|im_start|>system\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{%- endfor %}{{ '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{ '\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function %}
            {{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson(indent=2)) }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}{{ '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}{{ '<|im_start|>user\nresult: ' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'skip' %}{%- continue %}
    {%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- if quiet %}{{ '...' }}{%- endif %}{%- endif %}
"""
# in the manner of Llama 2 and Gemma: a beginning, stripped contents, a refusal
STRICT = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]{% else %} {{ message['content'] | trim }} {{ eos_token }}{% endif %}
{% endfor %}"""  # noqa: E501
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"town": {"type": "string"}}}}
CHATS = {
    "turns": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is 12 < 13 & naïve café?"},
        {"role": "assistant", "content": " a red circle\n"},
        {"role": "user", "content": "and\n\nnow"},
    ],
    "tools": [
        {"role": "user", "content": "weather in Åbo?"},
        {"role": "assistant", "content": None,
         "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Åbo <x>"}}}]},
        {"role": "tool", "name": "weather", "content": "12 °C"},
        {"role": "skip", "content": "nothing"},
    ],
}  # fmt: skip


def pair(directory, tokenizer, template: str):
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    stops = (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    return theirs, PretrainedProcessor.load(directory, MediaRule(), pad_id=0, stop_ids=stops)


@pytest.mark.parametrize("name", CHATS)
def test_chats(name, tmp_path):
    theirs, ours = pair(tmp_path, hosts.byte_level(*HEADERS), TOOLS)
    for options in ({}, {"quiet": True}):
        expected = theirs.apply_chat_template(
            CHATS[name], tools=[WEATHER], add_generation_prompt=True, return_dict=True, **options
        )["input_ids"]
        found = ours.prompt(CHATS[name], tools=[WEATHER], options=options).tokens.tolist()
        assert found == expected


def test_contents_in_either_form(tmp_path):
    """A list of texts where the template knows texts alone, and the other way; `Message`s as JSON."""
    _, ours = pair(tmp_path / "a", hosts.byte_level(*HEADERS), TOOLS)
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "now"}]
    plain = ours.prompt([{"role": "user", "content": "what now"}]).tokens.tolist()
    assert ours.prompt([{"role": "user", "content": parts}]).tokens.tolist() == plain
    assert ours.prompt([Message("user", (Text("what now"),))]).tokens.tolist() == plain
    _, lists = pair(tmp_path / "b", hosts.byte_level(*HEADERS), hosts.LLAVA_TEMPLATE)
    one = lists.prompt([{"role": "user", "content": "what now"}]).tokens.tolist()
    part = [{"type": "text", "text": "what now"}]
    assert one == lists.prompt([{"role": "user", "content": part}]).tokens.tolist()
    assert "what now" in lists.tokenizer.decode(one)


@pytest.mark.parametrize("begin", [True, False])
def test_strict_template_and_what_is_trained(begin, tmp_path):
    """Contents that the template strips; the answer and its stop token alone are trained on."""
    tokenizer = hosts.sentence_pieces("[INST]", "[/INST]", add_bos_token=begin)
    theirs, ours = pair(tmp_path, tokenizer, STRICT)
    ours.stop_ids = (theirs.eos_token_id,)
    chat = CHATS["turns"][1:3]
    expected = theirs.apply_chat_template(chat, return_dict=True)["input_ids"]
    example = ours.example(chat)
    assert example.tokens.tolist() == expected
    trained = ours.tokenizer.decode(example.tokens[example.loss_weights > 0], special=True)
    assert trained.strip() == "a red circle </s>"
    with pytest.raises(mm_jax.UserError, match="no system messages"):
        ours.prompt(CHATS["turns"])


def test_text_alone(tmp_path):
    """What a tokenizer puts around a text, with tokens that only its config names."""
    for k, tokenizer in enumerate(
        (
            hosts.sentence_pieces(add_bos_token=True, add_eos_token=True),
            hosts.byte_level(begin=True, additional_special_tokens=["<later>"]),
            hosts.byte_level("<a>", split_special_tokens=True),
        )
    ):
        tokenizer.save_pretrained(tmp_path / str(k))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / str(k))
        ours = PretrainedTokenizer.load(tmp_path / str(k))
        for text in ("a red circle", " naïve\n<later>x<a></s> 12", "", "日本 \U0001f600"):
            assert list(ours.encode(text, around=True)) == theirs(text)["input_ids"]
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert list(ours.encode(text)) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_places_of_a_template(tmp_path):
    """chat_template.jinja before chat_template.json before tokenizer_config.json, of several the default."""
    assert read_template(tmp_path) is None
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert read_template(tmp_path) == "b"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "c"}))
    assert read_template(tmp_path) == "c"
    (tmp_path / "chat_template.jinja").write_text("d")
    assert read_template(tmp_path) == "d"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{% for m in messages %}{{ m.pop('role') }}{% endfor %}",
        "{{ undefined_name.field }}",
        "{{ 1 // 0 }}",
    ],
)
def test_templates_cannot_leave_their_sandbox(source):
    with pytest.raises(mm_jax.UserError, match="chat template"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    with pytest.raises(mm_jax.UserError, match="cannot be read"):
        ChatTemplate("{% for %}", {})
