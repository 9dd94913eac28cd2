"""Messages to tokens, pictures and answers of the families whose checkpoints have no chat template, against
transformers' processors, which are given the text that the family's authors would write."""

import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from tests.parity import hosts, theirs  # noqa: E402
from tests.parity.checks import compiled  # noqa: E402

QUERIES = 5
SIDE = {"height": 24, "width": 24}
VISION = theirs.VISION | dict(image_size=24, patch_size=8)
QFORMER = dict(hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=44,
               max_position_embeddings=64)  # fmt: skip
ONE, TWO = hosts.picture(60, 31), hosts.picture(17, 40, "L")


def text(tokenizer, **more) -> dict:
    return theirs.TEXT | dict(vocab_size=len(tokenizer) + 3, max_position_embeddings=512) | more


def blip_2(directory):
    tokenizer = hosts.byte_level(begin=True)
    processor = transformers.Blip2Processor(
        transformers.BlipImageProcessorPil(size=SIDE), tokenizer, num_query_tokens=QUERIES
    )
    decoder = dict(ffn_dim=40, num_key_value_heads=None, intermediate_size=None, pad_token_id=0,
                   eos_token_id=tokenizer.convert_tokens_to_ids("Ċ"))  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=transformers.OPTConfig(**text(tokenizer, **decoder)).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return config, processor


def words(*specials: str) -> transformers.PreTrainedTokenizerFast:
    """Whole words like BERT's, of the second tokenizer of InstructBLIP."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    known = sorted({word for line in hosts.CORPUS for word in line.lower().replace("?", " ?").split()})
    vocab = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *known])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def instructblip(directory):
    tokenizer = hosts.sentence_pieces(add_bos_token=True)
    processor = transformers.InstructBlipProcessor(
        transformers.BlipImageProcessorPil(size=SIDE), tokenizer, words(), num_query_tokens=QUERIES
    )
    config = transformers.InstructBlipConfig(
        vision_config=VISION,
        qformer_config=QFORMER | dict(vocab_size=len(processor.qformer_tokenizer)),
        text_config=transformers.LlamaConfig(**text(tokenizer, eos_token_id=2)).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return config, processor


def paligemma(directory):
    tokenizer = hosts.byte_level(begin=True)
    images = transformers.SiglipImageProcessorPil(size=SIDE)
    images.image_seq_length = 9
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.GemmaConfig(**text(tokenizer, head_dim=12)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )
    return config, processor


def kosmos2(directory):
    first = ("<s>", "<pad>", "</s>", "<unk>")
    tokenizer = hosts.sentence_pieces(
        *(f"<unused{k}>" for k in range(QUERIES)), first=first, add_bos_token=True
    )
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=SIDE)
    processor = transformers.Kosmos2Processor(images, tokenizer)
    config = transformers.Kosmos2Config(
        text_config=dict(vocab_size=len(tokenizer), embed_dim=32, layers=2, ffn_dim=44, attention_heads=4,
                         max_position_embeddings=512),
        vision_config=VISION,
        latent_query_num=QUERIES,
    )  # fmt: skip
    return config, processor


FAMILIES = {
    "blip-2": (blip_2, "Blip2ForConditionalGeneration"),
    "instructblip": (instructblip, "InstructBlipForConditionalGeneration"),
    "paligemma": (paligemma, "PaliGemmaForConditionalGeneration"),
    "kosmos-2": (kosmos2, "Kosmos2ForConditionalGeneration"),
}
SCALES = {"qformer": 5.0, "query_tokens": 5.0, "vision_model": 2.0, "language_projection": 3.0, "x_attn": 3.0,
          "latent_query": 3.0}  # fmt: skip
EMBEDDINGS = {"kosmos-2": 1.5}  # of its 1,400 tokens the two best would often be too close to compare
# (conversation, the text of the reference's call)
CASES = {
    "blip-2": [
        (hosts.messages([ONE, "what is in the picture?"]), "Question: what is in the picture? Answer:"),
        (hosts.messages(["how many", TWO, " digits?"]), "Question: how many digits? Answer:"),
        (hosts.messages([ONE, "what?"], "a red circle", "where?"),
         "Question: what? Answer: a red circle. Question: where? Answer:"),
        (hosts.messages("no picture"), "Question: no picture Answer:"),
        (hosts.messages([ONE]), ""),
    ],
    "instructblip": [
        (hosts.messages([ONE, "what is in the picture?"]), "what is in the picture?"),
        (hosts.messages(["how many digits?", TWO], "there are 3", "where?"), "how many digits? there are 3\nwhere?"),
        (hosts.messages("no picture"), "no picture"),
    ],
    "paligemma": [
        (hosts.messages([ONE, "what is in the picture?"]), "<image>what is in the picture?"),
        (hosts.messages(["compare", ONE, TWO]), "<image><image>compare"),
        (hosts.messages([ONE]), "<image>"),
    ],
    "kosmos-2": [
        (hosts.messages([ONE, "<grounding> what is in the picture?"]), "<grounding> what is in the picture?"),
        (hosts.messages([TWO, " an image of"]), "an image of"),
        (hosts.messages("no picture"), "no picture"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    make, kind = FAMILIES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    config, processor = make(directory)
    scales = SCALES | {"embed_tokens": EMBEDDINGS.get(request.param, 0.4)}
    model = theirs.build(config, directory, kind, scales=scales)
    processor.save_pretrained(directory)
    return request.param, model, processor, mm_jax.load(directory)


def their_arrays(family: str, processor, conversation, written: str, **more) -> dict[str, np.ndarray]:
    pictures = [p["image"].convert("RGB") for m in conversation for p in m["content"] if p["type"] == "image"]
    if family == "kosmos-2":
        more["num_image_tokens"] = QUERIES
    if pictures:
        more["images"] = [pictures] if family == "paligemma" else pictures[0]
    arrays = dict(processor(text=written, return_tensors="np", **more))
    without = ("labels",) if pictures else ("labels", "qformer_input_ids", "qformer_attention_mask")
    return {name: array for name, array in arrays.items() if name not in without}


def test_pictures(pair):
    """Pixel values of odd sizes and modes."""
    family, _, processor, lm = pair
    images = [image for image in hosts.pictures().values() if image.mode == "RGB"]
    hosts.same_preprocessing(lm, processor, images)


def test_tokens_logits_and_answers(pair):
    family, model, processor, lm = pair
    compared = 0
    for conversation, written in CASES[family]:
        arrays = their_arrays(family, processor, conversation, written)
        batch = hosts.same_tokens(lm, arrays, [conversation])
        if "pixel_values" not in arrays:
            continue  # the reference has no such call
        ours = np.asarray(compiled(lm)(lm.params, batch))[0, : arrays["input_ids"].shape[1]]
        expected = theirs.logits(model, arrays)[0]
        assert 0.1 < expected.std() < 10 and np.abs(ours - expected).max() <= 1e-4
        ids, margins = theirs.generate(model, arrays, 8)
        close = np.flatnonzero(margins[0] < 0.02)
        length = int(close[0]) if len(close) else 8
        said = lm.generate(batch, 8, ignore_eos=True)[0]
        assert said[:length].tolist() == ids[0][:length].tolist()
        compared += length
    assert compared >= 8


TRAINED = {
    "blip-2": "a red circle\n",
    "instructblip": "a red circle</s>",
    "paligemma": "a red circle</s>",
    "kosmos-2": "a red circle</s>",
}


def test_what_is_trained(pair):
    """The answer and its end; in PaliGemma's case the reference's suffix, which is read in one direction."""
    family, _, processor, lm = pair
    question = hosts.messages([ONE, "what is in the picture?"])
    example = lm.processor.example(hosts.messages([ONE, "what is in the picture?"], "a red circle"))
    trained = example.loss_weights > 0
    assert lm.processor.tokenizer.decode(example.tokens[trained], special=True).strip(" ") == TRAINED[family]
    assert not trained[: trained.argmax()].any() and trained[trained.argmax() :].all()
    if family == "paligemma":
        written = CASES[family][0][1]
        arrays = their_arrays(family, processor, question, written, suffix="a red circle")
        assert arrays["input_ids"][0].tolist() == example.tokens.tolist()
        assert arrays["token_type_ids"][0].tolist() == trained.tolist()
    elif family == "instructblip":  # the Q-Former must not see the answer
        asked = lm.processor.prompt(question)
        assert np.array_equal(example.slots["instructions"], asked.slots["instructions"])


def test_saved_directory_answers_the_same(pair, tmp_path):
    """All tokenizers go along; processors can be pickled."""
    family, _, _, lm = pair
    mm_jax.save(lm, tmp_path)
    copies = mm_jax.load(tmp_path).processor, pickle.loads(pickle.dumps(lm.processor))
    conversation = CASES[family][0][0]
    expected = lm.processor.prompt(conversation)
    for copy in copies:
        found = copy.prompt(conversation)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert all(np.array_equal(found.slots[k], v) for k, v in expected.slots.items())
    assert mm_jax.load(tmp_path).chat(conversation, 4) == lm.chat(conversation, 4)


def test_too_long_an_instruction(pair):
    family, _, _, lm = pair
    if family != "instructblip":
        pytest.skip("no other family has a second tokenizer")
    with pytest.raises(mm_jax.UserError, match="102 tokens of the Q-Former, which reads 64"):
        lm.processor.prompt(hosts.messages([ONE, "what " * 100]))
