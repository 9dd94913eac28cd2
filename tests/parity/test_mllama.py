"""Llama-3.2-Vision against transformers."""

import json
import shutil

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.mllama import image_processing_pil_mllama as reference  # noqa: E402
from transformers.models.mllama import processing_mllama as processing  # noqa: E402

import mm_jax  # noqa: E402
from mm_jax.data.tiled_rule import canvas  # noqa: E402
from mm_jax.inference.request import Request  # noqa: E402
from mm_jax.inference.sampling import Sampling  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import (  # noqa: E402
    compiled,
    same_after_saving,
    same_gradients,
    same_greedy,
    same_logits,
)
from tests.parity.hosts import (  # noqa: E402
    CHATML,
    byte_level,
    messages,
    picture,
    pictures,
    same_answers,
    same_preprocessing,
    same_tokens,
    their_arrays,
)

IMAGE = 97  # the first row of the embedding behind the vocabulary
TEMPLATE = "{{ bos_token }}" + CHATML.replace("'<' + part.type + '>'", "'<|image|>'")
KIND = "MllamaForConditionalGeneration"
TEXT = theirs.TEXT | dict(bos_token_id=1, num_hidden_layers=4, cross_attention_layers=[1, 3])
VISION = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=3, num_global_layers=2, attention_heads=3,
              image_size=16, patch_size=8, intermediate_layers_indices=[0, 2], vision_output_dim=72)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # fmt: skip
CASES = {
    # a period of two layers, repeated
    "mllama": (dict(rope_parameters=LLAMA3), {}),
    # no period but the whole; all heads; one picture size of two tiles; no taps
    "irregular": (
        dict(num_hidden_layers=3, cross_attention_layers=[0], num_key_value_heads=4),
        dict(max_num_tiles=2, supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]], intermediate_layers_indices=[1],
             vision_output_dim=48, image_size=24, hidden_act="gelu_pytorch_tanh", norm_eps=1e-3),
    ),
}  # fmt: skip
SCALES = {"embedding.weight": 3.0, "v_proj": 2.0, "o_proj": 2.0}


def build(case: str, directory):
    text, vision = CASES[case]
    config = transformers.MllamaConfig(
        text_config=TEXT | text, vision_config=VISION | vision, image_token_index=IMAGE
    )
    model = theirs.build(config, directory, KIND, scales=SCALES)
    return model, processor(VISION | vision)


def processor(vision):
    size, tiles = vision["image_size"], vision.get("max_num_tiles", 4)
    return reference.MllamaImageProcessorPil(size={"height": size, "width": size}, max_image_tiles=tiles)


def prompts(pixels, places=((1,), (0, 1, 7)), pad_left=False) -> dict[str, np.ndarray]:
    """Rows of different lengths with a picture before each of these text tokens, as the reference's processor has
    them; pictures are of different shapes."""
    rows = tuple(tuple((place, 1) for place in row) for row in places)
    arrays = theirs.pictured(rows, IMAGE, 1, (1, 1), pad_left=pad_left)
    arrays = {name: arrays[name] for name in ("input_ids", "attention_mask")}
    sizes = iter([(30, 16), (9, 40), (20, 20), (64, 64), (13, 50), (16, 16)] * 2)
    images = [[np.array(picture(*next(sizes))) for _ in row] for row in places]
    if not any(images):
        return arrays
    made = pixels(images, return_tensors="np")
    tiles = made.pop("num_tiles")
    dense = cross_mask(arrays["input_ids"], IMAGE, tiles, pixels.max_image_tiles)
    return arrays | dict(made) | {"cross_attention_mask": dense}


def cross_mask(input_ids: np.ndarray, token: int, tiles: list[list[int]], most: int) -> np.ndarray:
    """What the reference's processor makes of the tiles of each row's pictures."""
    ids = input_ids.tolist()
    places = [processing.get_cross_attention_token_mask(row, token) for row in ids]
    return processing.convert_sparse_cross_attention_mask_to_dense(places, tiles, most, len(ids[0]))


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    """Several pictures, side by side and apart; rows with fewer or none; padding on either side; text alone; greedy
    answers; the way back."""
    model, pixels = build(case, tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    assert lm.family == "mllama"
    right, left = prompts(pixels), prompts(pixels, pad_left=True)
    for arrays in (right, left, prompts(pixels, ((), (0, 4, 5))), theirs.rows(97)):
        same_logits(model, lm, arrays)
    same_after_saving(model, lm, right, tmp_path / "out", KIND)


def test_gradients(tmp_path):
    model, pixels = build("mllama", tmp_path / "in")
    same_gradients(model, mm_jax.load(tmp_path / "in"), prompts(pixels), tmp_path / "out")


def test_tower_alone(tmp_path):
    config = transformers.MllamaConfig(text_config=TEXT, vision_config=VISION).vision_config
    model = theirs.build(config, tmp_path, "MllamaVisionModel", scales=SCALES)
    arrays = prompts(processor(VISION))
    given = {name: arrays[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    with torch.no_grad():
        expected = model(**{k: torch.from_numpy(v) for k, v in given.items()}).last_hidden_state.numpy()
    tower = mm_jax.load(tmp_path)
    ours = np.asarray(jax.jit(tower.apply)(tower.params, tower.batch(**given)))
    assert expected.std() > 0.3
    assert np.abs(ours - expected.reshape(ours.shape)).max() <= 1e-4


def build_chat(directory):
    """A checkpoint with tokenizer, template and settings; the picture's token is no word of the vocabulary."""
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", "<|python_tag|>", begin=True, eos_token="<|im_end|>")
    tokenizer.add_tokens(["<|image|>"], special_tokens=True)
    token = tokenizer.convert_tokens_to_ids("<|image|>")
    assert token == len(tokenizer) - 1
    config = transformers.MllamaConfig(
        text_config=TEXT | dict(vocab_size=token, max_position_embeddings=512),
        vision_config=VISION,
        image_token_index=token,
    )
    model = theirs.build(config, directory, KIND, scales=SCALES)
    found = transformers.MllamaProcessor(processor(VISION), tokenizer, chat_template=TEMPLATE)
    found.save_pretrained(directory)
    return model, found


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mllama")
    return *build_chat(directory), mm_jax.load(directory)


TALKS = [
    messages(["what is this?", picture(40, 30)]),
    messages([picture(20, 90), picture(33, 20), "which is red?"], "the first", [picture(16, 16), "and now?"]),
]


def test_preprocessing(chat):
    """Odd sizes, aspect ratios and modes; canvases of all shapes."""
    _, found, lm = chat
    worst = same_preprocessing(lm, found, list(pictures().values()), tolerance=1e-6)
    assert worst <= 1e-6
    random = np.random.default_rng(0)
    for height, width in random.integers(1, 90, (300, 2)).tolist():
        rows, columns = reference.get_optimal_tiled_canvas(height, width, 4, 16)
        size = reference.get_image_size_fit_to_canvas(height, width, rows, columns, 16)
        assert canvas((height, width), 4, 16) == ((rows // 16, columns // 16), tuple(map(int, size)))


def test_messages(chat):
    """Tokens, which of them see what, logits and answers; the rows of a batch do not see each other's pictures."""
    model, found, lm = chat
    together = lm.batch(messages=TALKS)
    rows = np.asarray(compiled(lm)(lm.params, together))
    for row, seen, segments, talk in zip(rows, together["seen"], together["segment_ids"], TALKS, strict=True):
        arrays = their_arrays(found, [talk])
        same_tokens(lm, arrays, [talk])
        given = lm.batch(**arrays)["seen"][0]
        shares = given.shape[1]
        assert np.array_equal(seen[segments > 0][:, :shares], given) and not seen[:, shares:].any()
        expected = theirs.logits(model, arrays)[0]
        assert np.abs(row[segments > 0] - expected).max() <= 1e-5
    same_answers(model, found, lm, TALKS[:1])


def test_answers_of_several_turns(chat):
    """Another picture changes what is read of all tokens, and the engine notices; keys are kept between the steps."""
    model, found, lm = chat
    same = [messages(["what is this?", picture(40, 30)]), messages(["what is this?", picture(30, 40)])]
    prompts_ = [lm.read(lm.prompt(talk)) for talk in (*same, same[0])]
    assert not (prompts_[0].keys == prompts_[1].keys).any() and (prompts_[0].keys == prompts_[2].keys).all()
    fresh = [
        lm.generate(lm.batch(messages=[talk]), 6, ignore_eos=True)[0].tolist() for talk in (*same, TALKS[1])
    ]
    engine = lm.engine(2)
    text = lm.read(lm.prompt(messages("what?")))
    requests = [Request(p, Sampling(), 6, True) for p in (prompts_[0], text, prompts_[1], prompts_[2])]
    requests.append(Request(lm.read(lm.prompt(TALKS[1])), Sampling(), 6, True))
    answers = [engine.submit(request) for request in requests]
    while engine.busy:
        engine.step()
    said = [answer.tokens for answer in answers]
    assert [said[0], said[2], said[3], said[4]] == [fresh[0], fresh[1], fresh[0], fresh[2]]
    assert said[1] == lm.generate(lm.batch(messages=[messages("what?")]), 6, ignore_eos=True)[0].tolist()


def test_greedy(tmp_path):
    """Left-padded rows with different numbers of pictures."""
    model, pixels = build("mllama", tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    same_greedy(model, lm, prompts(pixels, pad_left=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a | {"aspect_ratio_ids": a["aspect_ratio_ids"][:, :1]}, "aspect_ratio_ids has shape"),
        (lambda a: a | {"aspect_ratio_ids": a["aspect_ratio_ids"] + 9}, "aspect_ratio_ids are 0 to 8"),
        (lambda a: {k: v for k, v in a.items() if k != "aspect_ratio_ids"}, "need aspect_ratio_ids"),
        (lambda a: a | {"pixel_values": a["pixel_values"][..., :8]}, "pixel_values has shape"),
        (
            lambda a: a | {"cross_attention_mask": a["cross_attention_mask"][:, 1:]},
            "cross_attention_mask has",
        ),
        (lambda a: a | {"aspect_ratio_mask": a["aspect_ratio_mask"][..., ::-1]}, "behind one that is not"),
    ],
)
def test_wrong_batches(chat, change, message):
    _, found, lm = chat
    with pytest.raises(mm_jax.UserError, match=message):
        lm.batch(**change(their_arrays(found, TALKS)))


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("text_config", dict(cross_attention_layers=[4]), "cross_attention_layers"),
        ("vision_config", dict(supported_aspect_ratios=[[1, 1], [4, 1]]), "supported_aspect_ratios"),
        ("vision_config", dict(vision_output_dim=24), "vision_output_dim"),
        ("vision_config", dict(num_channels=1), "num_channels"),
        ("text_config", dict(qk_norm=True), "qk_norm"),
    ],
)
def test_fields_that_change_numbers(chat, part, change, message, tmp_path):
    where = chat[2].checkpoint.directory
    for file in ("model.safetensors", "config.json"):
        shutil.copy(where / file, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values[part] |= change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(mm_jax.UserError, match=message):
        mm_jax.load(tmp_path)
