"""LLaVA-1.5 against transformers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from tests.parity import theirs  # noqa: E402
from tests.parity.checks import same_after_saving, same_gradients, same_greedy, same_logits  # noqa: E402

IMAGE = 96
KIND = "LlavaForConditionalGeneration"
CASES = {
    "clip-llama": ("CLIPVision", "Llama", {}, {}),
    "full": ("CLIPVision", "Llama", {}, dict(vision_feature_select_strategy="full", vision_feature_layer=-1)),
    "layers-mistral": (
        "CLIPVision",
        "Mistral",
        dict(sliding_window=7),
        dict(vision_feature_layer=[-2, 1, 0], multimodal_projector_bias=False),
    ),
    "siglip-qwen2": (
        "SiglipVision",
        "Qwen2",
        dict(tie_word_embeddings=True),
        dict(vision_feature_select_strategy="full", projector_hidden_act="relu", tie_word_embeddings=True),
    ),
}


def build(case: str, directory, **save):
    tower, decoder, text, options = CASES[case]
    vision = getattr(transformers, f"{tower}Config")(**theirs.VISION, image_size=24, patch_size=8)
    text = getattr(transformers, f"{decoder}Config")(**theirs.TEXT | text)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, **options
    )
    return theirs.build(config, directory, KIND, **save)


def prompts(each: int, images=((1,), (0, 5)), pad_left: bool = False, seed: int = 0):
    """Rows of different lengths with pictures before these text tokens."""
    random = np.random.default_rng(seed)
    texts = []
    for row, places in enumerate(images):
        ids = random.integers(3, IMAGE, 6 + 3 * row).tolist()
        for place in reversed(places):
            ids[place:place] = [IMAGE] * each
        texts.append(ids)
    size = max(map(len, texts))
    padded = [[0] * (size - len(t)) + t if pad_left else t + [0] * (size - len(t)) for t in texts]
    mask = [
        [0] * (size - len(t)) + [1] * len(t) if pad_left else [1] * len(t) + [0] * (size - len(t))
        for t in texts
    ]
    arrays = {"input_ids": np.array(padded), "attention_mask": np.array(mask)}
    if count := sum(map(len, images)):
        arrays["pixel_values"] = random.normal(size=(count, 3, 24, 24)).astype(np.float32)
    return arrays


@pytest.mark.parametrize("case", CASES)
def test_matches_transformers(case, tmp_path):
    """One picture and several, padding on either side, no picture; greedy answers; the way back."""
    model = build(case, tmp_path / "in")
    lm = mm_jax.load(tmp_path / "in")
    each = 10 if case == "full" else 9
    assert lm.family == "llava" and lm.config.image_tokens == each
    right, left = prompts(each), prompts(each, pad_left=True)
    same_logits(model, lm, right)
    same_logits(model, lm, left)
    same_logits(model, lm, prompts(each, ((), ())))
    same_logits(model, lm, prompts(each, ((), (4, 2))))
    if case != "siglip-qwen2":
        same_greedy(model, lm, left)
    same_after_saving(model, lm, right, tmp_path / "out", KIND)
    same_gradients(model, lm, left, tmp_path / "gradients")


def hub(name: str) -> str:
    """The spelling of the released checkpoints."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def module(name: str) -> str:
    """The spelling of the model's own state_dict in version 5."""
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.replace("language_model.lm_head.", "lm_head.")
    return "model." + name if name.startswith(("vision_tower", "multi_modal_projector")) else name


@pytest.mark.parametrize("spelling", [hub, module])
def test_spellings(spelling, tmp_path):
    build("clip-llama", tmp_path)
    before = mm_jax.load(tmp_path)
    theirs.rename(tmp_path, spelling)
    after = mm_jax.load(tmp_path)
    for one, two in zip(*(map(np.asarray, leaves(lm.params)) for lm in (before, after)), strict=True):
        assert np.array_equal(one, two)
    assert before.checkpoint.unused.keys() == after.checkpoint.unused.keys()


def leaves(params):
    return [x for v in params.values() for x in leaves(v)] if isinstance(params, dict) else [params]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a | {"pixel_values": a["pixel_values"][:2]}, r"2 images take 9, 9 tokens.*\[9, 18\]"),
        (lambda a: {k: v for k, v in a.items() if k != "pixel_values"}, "27 image tokens.*no pixel_values"),
        (lambda a: a | {"pixel_values": a["pixel_values"][..., :16]}, r"\[pictures, 3, 24, 24\] is needed"),
        (lambda a: a | {"input_ids": a["input_ids"] + 90}, "the vocabulary has 0 to 96"),
        (lambda a: a | {"attention_mask": a["attention_mask"][:1]}, "attention_mask has shape"),
        (lambda a: a | {"pixel_value": a["pixel_values"]}, 'did you mean "pixel_values"'),
        (lambda a: {"pixel_values": a["pixel_values"]}, "at least input_ids"),
    ],
)
def test_wrong_batches(change, message, llava):
    with pytest.raises(mm_jax.UserError, match=message):
        llava.batch(**change(prompts(9)))


def test_chat_says_what_is_missing(llava):
    with pytest.raises(mm_jax.UserError, match="no tokenizer.json"):
        llava.chat([{"role": "user", "content": "hello"}])


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llava")
    build("clip-llama", directory)
    return mm_jax.load(directory)
