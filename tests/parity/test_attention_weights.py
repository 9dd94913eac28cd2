"""Where a model looked, against the attention that transformers returns."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from einops import reduce  # noqa: E402

import mm_jax  # noqa: E402
from mm_jax.inference.attention import looks, words_of  # noqa: E402
from tests.parity import hosts, test_llava_chat, test_qwen_chat  # noqa: E402

NEW = 6


def returned(model, arrays: dict[str, np.ndarray]):
    """What the reference returns with its attentions, which needs its plainest implementation."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**{name: torch.tensor(array) for name, array in arrays.items()}, output_attentions=True)


def with_answer(arrays: dict[str, np.ndarray], ids: np.ndarray) -> dict[str, np.ndarray]:
    found = dict(arrays)
    for name, more in (("input_ids", ids), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in found:
            row = np.broadcast_to(np.asarray(more), (1, len(ids))).astype(found[name].dtype)
            found[name] = np.concatenate([found[name], row], axis=1)
    return found


def same_decoder(model, lm, conversation, arrays):
    """The prompt, its answer, and our weights, which are the reference's."""
    ids = lm.generate(lm.batch(conversation), NEW, ignore_eos=True)[0]
    prompt, weights = lm.attention(conversation, ids)
    expected = np.stack([x[0].numpy() for x in returned(model, with_answer(arrays, ids)).attentions])
    assert expected.max() > 0.1 and np.abs(weights["decoder"] - expected).max() < 1e-5
    return prompt, ids, expected


def test_pictures_of_any_size(tmp_path):
    """Qwen2-VL: tokens of a picture stand row by row, each for a square of four patches."""
    model, tokenizer, images = test_qwen_chat.build(tmp_path)
    lm = mm_jax.load(tmp_path)
    conversation = hosts.messages([hosts.picture(60, 31), "and", hosts.picture(17, 90), "compare"])
    arrays = test_qwen_chat.their_arrays(tokenizer, images, conversation)
    prompt, ids, expected = same_decoder(model, lm, conversation, arrays)
    words = words_of(lm.processor, ids)
    found = looks(lm, prompt, ids, [word.tokens for word in words])
    media = np.flatnonzero(prompt.tokens == tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    sizes = [(60, 31), (17, 90)]
    for word, pictures in zip(words, found, strict=True):
        rows = [prompt.length - 1 + k for k in range(len(ids))[word.tokens]]
        mean = expected[:, :, rows].mean(axis=(0, 1, 2))[media]
        at = 0
        for look, (_, high, wide), size in zip(pictures, arrays["image_grid_thw"], sizes, strict=True):
            assert look.weights.shape == (high, wide)
            squares = reduce(look.weights, "(r a) (c b) -> r c", "sum", a=2, b=2)
            count = squares.size
            np.testing.assert_allclose(squares, mean[at : at + count].reshape(squares.shape), atol=1e-6)
            at += count
            np.testing.assert_allclose(look.area, (0, 0, *size))
        assert at == len(media)


@pytest.mark.parametrize("case", ["crop", "pad"])
def test_pictures_of_one_size(case, tmp_path):
    """LLaVA: one patch a token; what was cropped away or padded shows in the area."""
    model, processor = test_llava_chat.build(case, tmp_path)
    lm = mm_jax.load(tmp_path)
    conversation = hosts.messages(["what is in the picture?", hosts.picture(60, 30)])
    arrays = hosts.their_arrays(processor, [conversation])
    prompt, ids, expected = same_decoder(model, lm, conversation, arrays)
    ((look,),) = looks(lm, prompt, ids, [slice(2, 4)])
    media = np.flatnonzero(prompt.tokens == model.config.image_token_index)
    mean = expected[:, :, prompt.length + 1 : prompt.length + 3].mean(axis=(0, 1, 2))[media]
    np.testing.assert_allclose(look.weights, mean.reshape(3, 3), atol=1e-6)
    np.testing.assert_allclose(look.area, (15, 0, 45, 30) if case == "crop" else (0, -15, 60, 45), atol=0.7)
