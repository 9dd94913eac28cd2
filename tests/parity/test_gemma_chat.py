"""Gemma-3 and DeepSeek-VL from messages: crops, tokens and answers against transformers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.data.crop_rule import crops  # noqa: E402
from mm_jax.families import deepseek_vl, gemma3  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity.checks import compiled  # noqa: E402

# as of the released Gemma-3
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
SYSTEM = [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}]
CONVERSATIONS = [
    hosts.messages(["what is in the picture?", hosts.picture(60, 31)]),
    hosts.messages([hosts.picture(17, 40), hosts.picture(33, 33), " compare: naïve, 12 %"], "a red circle",
                   ["and now?", hosts.picture(90, 24)]),
    SYSTEM + hosts.messages("no picture at all"),
]  # fmt: skip
PAN = dict(do_pan_and_scan=True, pan_and_scan_min_crop_size=16, pan_and_scan_max_num_crops=3,
           pan_and_scan_min_ratio_to_activate=1.2)  # fmt: skip


def gemma(directory, **pan):
    names = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = hosts.byte_level(
        *names.values(), "<start_of_turn>", "<end_of_turn>", begin=True, extra_special_tokens=names
    )
    images = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, **pan)
    processor = transformers.Gemma3Processor(images, tokenizer, chat_template=GEMMA, image_seq_length=4)
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(
            **theirs.VISION, image_size=32, patch_size=8, vision_use_head=False
        ),
        text_config=transformers.Gemma3TextConfig(
            **theirs.TEXT | dict(vocab_size=len(tokenizer), max_position_embeddings=512, head_dim=12,
                                 layer_types=["sliding_attention", "full_attention"], sliding_window=9,
                                 query_pre_attn_scalar=8),
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        mm_tokens_per_image=4,
    )  # fmt: skip
    scales = {"mm_input_projection": 4.0, "embed_tokens": 0.4}
    model = theirs.build(config, directory, "Gemma3ForConditionalGeneration", scales=scales)
    processor.save_pretrained(directory)
    return model, processor


def deepseek(directory):
    names = {"image_token": "<image_placeholder>"}
    tokenizer = hosts.sentence_pieces(*names.values(), add_bos_token=True, extra_special_tokens=names)
    template = hosts.LLAVA_TEMPLATE.replace("<image>", "<image_placeholder>")
    processor = transformers.DeepseekVLProcessor(
        transformers.DeepseekVLImageProcessorPil(size={"height": 24, "width": 24}, min_size=3),
        tokenizer,
        chat_template=template,
        num_image_tokens=9,
    )
    config = transformers.DeepseekVLConfig(
        vision_config=transformers.SiglipVisionConfig(**theirs.VISION, image_size=24, patch_size=8),
        text_config=transformers.LlamaConfig(
            **theirs.TEXT | dict(vocab_size=len(tokenizer), max_position_embeddings=512)
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    model = theirs.build(config, directory, "DeepseekVLForConditionalGeneration")
    processor.save_pretrained(directory)
    return model, processor


@pytest.fixture(scope="module", params=["gemma3", "gemma3-crops", "deepseek_vl"])
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    made = {"gemma3": gemma, "gemma3-crops": lambda d: gemma(d, **PAN), "deepseek_vl": deepseek}
    model, processor = made[request.param](directory)
    return request.param, model, processor, mm_jax.load(directory), directory


def their_arrays(case: str, processor, conversations) -> dict[str, np.ndarray]:
    if case != "gemma3-crops":
        return hosts.their_arrays(processor, conversations)
    # the processor's own default comes before the image processor's
    how = {"return_tensors": "np", "padding": True, "do_pan_and_scan": True, **PAN}
    return dict(
        processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, add_generation_prompt=True, processor_kwargs=how
        )
    )


def test_pictures(pair):
    case, _, processor, lm, _ = pair
    images = [image for image in hosts.pictures().values() if image.mode == "RGB"]
    hosts.same_preprocessing(lm, processor, images)


def test_tokens_and_answers(pair):
    case, model, processor, lm, _ = pair
    arrays = their_arrays(case, processor, CONVERSATIONS)
    if case == "gemma3-crops":
        assert len(arrays["pixel_values"]) == 4 + 2 + 2 + 3
    batch = hosts.same_tokens(lm, arrays, CONVERSATIONS)
    ours = np.asarray(compiled(lm)(lm.params, batch))
    expected, mask = theirs.logits(model, arrays), arrays["attention_mask"].astype(bool)
    for row, real in enumerate(mask):
        assert np.abs(ours[row, : real.sum()] - expected[row][real]).max() <= 1e-4
    if case != "gemma3-crops":
        hosts.same_answers(model, processor, lm, CONVERSATIONS, 6)


def test_template_of_the_family(pair, tmp_path):
    """Where the checkpoint has none."""
    case, _, processor, lm, directory = pair
    if case != "deepseek_vl":
        own = lm.processor.with_template(gemma3.TEMPLATE)
        for conversation in CONVERSATIONS:
            expected = lm.processor.prompt(conversation).tokens.tolist()
            assert own.prompt(conversation).tokens.tolist() == expected
        return
    own = lm.processor.with_template(deepseek_vl.TEMPLATE)
    system = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the "
        "user provides, and assist the user with a variety of tasks using natural language."
    )
    pad = "<image_placeholder>" * 9
    written = [
        f"{system}\n\nUser: what is in the picture?{pad}\n\nAssistant:",
        f"{system}\n\nUser: {pad}{pad} compare: naïve, 12 %\n\nAssistant: a red circle</s>User: and now?{pad}\n\n"
        "Assistant:",
        "be brief\n\nUser: no picture at all\n\nAssistant:",
    ]
    for conversation, expected in zip(CONVERSATIONS, written, strict=True):
        assert own.prompt(conversation).tokens.tolist() == processor.tokenizer(expected)["input_ids"]
    example = own.example(hosts.messages([hosts.picture(24, 24), "what?"], "a red circle"))
    trained = lm.processor.tokenizer.decode(example.tokens[example.loss_weights > 0], special=True)
    assert trained == "a red circle</s>"


def test_crops():
    """Of the reference, at its own settings and at small ones."""
    rule = transformers.Gemma3ImageProcessorPil()
    random = np.random.default_rng(0)
    for height, width in [
        *random.integers(1, 2000, (150, 2)),
        (512, 512),
        (600, 500),
        (500, 600),
        (1000, 250),
    ]:
        for least, most, ratio in ((256, 4, 1.2), (16, 3, 2.0)):
            image = np.zeros((3, height, width), np.uint8)
            expected = rule.pan_and_scan(image, least, most, ratio)
            found = [image[(slice(None), *part)] for part in crops((height, width), least, most, ratio)]
            assert [part.shape for part in found] == [part.shape for part in expected]
