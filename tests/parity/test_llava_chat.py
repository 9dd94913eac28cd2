"""LLaVA-1.5 from messages: tokenizer, template, pictures and answers against transformers."""

import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity.checks import compiled  # noqa: E402

KIND = "LlavaForConditionalGeneration"
CASES = {
    # as released: Llama's tokenizer, CLIP's crop
    "crop": (hosts.sentence_pieces, dict(add_bos_token=True), "CLIPImageProcessorPil", {}),
    "pad": (hosts.byte_level, dict(begin=True), "LlavaImageProcessorPil", dict(do_pad=True)),
    "stretch": (
        hosts.byte_level,
        {},
        "SiglipImageProcessorPil",
        dict(size={"height": 24, "width": 24}, resample=2, rescale_factor=1 / 128),
    ),
}


def build(case: str, directory):
    make, options, image, settings = CASES[case]
    tokenizer = make("<image>", extra_special_tokens={"image_token": "<image>"}, **options)
    settings = dict(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}) | settings
    processor = transformers.LlavaProcessor(
        image_processor=getattr(transformers, image)(**settings),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=hosts.LLAVA_TEMPLATE,
    )
    vision = transformers.CLIPVisionConfig(**theirs.VISION, image_size=24, patch_size=8)
    text = transformers.LlamaConfig(
        **theirs.TEXT | dict(vocab_size=len(tokenizer) + 3, max_position_embeddings=256)
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = theirs.build(config, directory, KIND)
    processor.save_pretrained(directory)
    return model, processor


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    model, processor = build(request.param, directory)
    return model, processor, mm_jax.load(directory), directory


CONVERSATIONS = [
    hosts.messages(["what is in the picture?", hosts.picture(60, 31)]),
    hosts.messages([hosts.picture(17, 40, "L"), hosts.picture(33, 33, "P"), "compare: naïve, 12 %"], "a red circle",
                   ["and now?", hosts.picture(24, 24)]),
    hosts.messages("no picture at all"),
]  # fmt: skip


def test_pictures(pair):
    """Pixel values of odd sizes and modes, to the bit."""
    _, processor, lm, _ = pair
    images = list(hosts.pictures().values())
    hosts.same_preprocessing(lm, processor, images, 0.0)


def test_rotated_files(pair, tmp_path):
    """EXIF rotation of files, as the reference's loader has it."""
    _, processor, lm, _ = pair
    for orientation in (1, 3, 6, 8):
        path = tmp_path / f"{orientation}.jpg"
        path.write_bytes(hosts.rotated(hosts.picture(50, 20), orientation))
        expected = processor.image_processor(images=transformers.image_utils.load_image(str(path)))
        ours = lm.preprocess(images=[str(path)])["pixel_values"]
        assert np.array_equal(ours, np.stack(expected["pixel_values"]))


def test_tokens_and_logits(pair):
    model, processor, lm, _ = pair
    arrays = hosts.their_arrays(processor, CONVERSATIONS)
    batch = hosts.same_tokens(lm, arrays, CONVERSATIONS)
    ours = np.asarray(compiled(lm)(lm.params, batch))
    expected, mask = theirs.logits(model, arrays), arrays["attention_mask"].astype(bool)
    for row, real in enumerate(mask):
        assert np.abs(ours[row, : real.sum()] - expected[row][real]).max() <= 1e-4
    hosts.same_tokens(lm, hosts.their_arrays(processor, CONVERSATIONS, pad_left=True), CONVERSATIONS)


def test_answers(pair):
    model, processor, lm, directory = pair
    hosts.same_answers(model, processor, lm, CONVERSATIONS)
    streamed = "".join(lm.stream(CONVERSATIONS[1], max_new_tokens=4))
    assert streamed == lm.chat(CONVERSATIONS[1], max_new_tokens=4)


def test_saved_directory_answers_the_same(pair, tmp_path):
    """Tokenizer, template and processor files go along; transformers and we read the copy."""
    _, processor, lm, _ = pair
    mm_jax.save(lm, tmp_path / "out", format="hf")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "USER: <image> how many?"
    assert again(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    copy = mm_jax.load(tmp_path / "out")
    assert copy.chat(CONVERSATIONS[0], max_new_tokens=4) == lm.chat(CONVERSATIONS[0], max_new_tokens=4)


def test_trainable_tokens_are_those_of_the_generation_tags(pair):
    _, processor, lm, _ = pair
    conversation = hosts.messages(["what?", hosts.picture(30, 30)], "a red circle", "where?", "to the left")
    expected = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="np",
        processor_kwargs={"return_offsets_mapping": True},
    )  # fmt: skip
    example = lm.processor.example(conversation)
    assert example.tokens.tolist() == np.asarray(expected["input_ids"])[0].tolist()
    mask = np.asarray(expected["assistant_masks"])[0]
    assert mask.sum() > 4 and example.loss_weights.tolist() == mask.tolist()


def test_the_processor_is_picklable(pair):
    lm = pair[2]
    copy = pickle.loads(pickle.dumps(lm.processor))
    one, two = (p.prompt(CONVERSATIONS[0]) for p in (lm.processor, copy))
    assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.pixel_values, two.pixel_values)


@pytest.mark.parametrize(
    "messages, message",
    [
        (
            [{"role": "user", "content": "two <image> words"}],
            "0 of picture in the messages, but the text has 1",
        ),
        (
            [{"role": "user", "content": [{"type": "audio", "audio": b"x"}]}],
            "a clip, but this model takes none",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]}],
            "nowhere.png: no such file",
        ),
        ([{"role": "assistant", "content": "a"}], "must be a user's question"),
    ],
)
def test_wrong_messages(messages, message, pair):
    with pytest.raises(mm_jax.UserError, match=message):
        pair[2].chat(messages)
