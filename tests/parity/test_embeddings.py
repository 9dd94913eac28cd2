"""Vectors of texts and pictures: the last hidden state of transformers' model at the prompt's last token."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mm_jax  # noqa: E402
from mm_jax.data.messages import Image, Text  # noqa: E402
from tests.parity import hosts, test_llava_chat, test_qwen_chat, theirs  # noqa: E402

PICTURES = [hosts.picture(40, 40), hosts.picture(61, 33)]


def hidden(model, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Of the last token of one row, divided by its length."""
    with torch.no_grad():
        inputs = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        found = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1].numpy()
    return found / np.linalg.norm(found)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_texts_and_pictures(family, tmp_path):
    if family == "llava":
        model, processor = test_llava_chat.build("pad", tmp_path)

        def arrays(parts):
            return hosts.their_arrays(processor, [hosts.messages(parts)])
    else:
        model, *files = test_qwen_chat.build(tmp_path)

        def arrays(parts):
            return test_qwen_chat.their_arrays(*files, hosts.messages(parts))

    lm = mm_jax.load(tmp_path)
    asked = [
        ["what is in it"],
        [PICTURES[0]],
        [PICTURES[1], "what colour"],
        ["one ", PICTURES[0], "two", PICTURES[1]],
    ]
    expected = [hidden(model, arrays(parts)) for parts in asked]
    inputs = [[Text(p) if isinstance(p, str) else Image(p) for p in parts] for parts in asked]
    ours = lm.embed(inputs)
    error = np.abs(ours - expected).max()
    assert error < 1e-5, error
    assert (np.asarray(expected) @ ours.T - np.eye(4)).max() < 0.99  # no two are alike
    for one, vector in zip(inputs, ours, strict=True):
        np.testing.assert_allclose(lm.embed([one])[0], vector, atol=1e-6)


def test_a_text_model_without_template(tmp_path):
    tokenizer = hosts.byte_level(begin=True)
    config = transformers.LlamaConfig(**theirs.TEXT | dict(vocab_size=len(tokenizer)))
    model = theirs.build(config, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = mm_jax.load(tmp_path)
    texts = ["the red square", "a blue circle and more", "one"]
    expected = [
        hidden(model, tokenizer([text], return_tensors="np", return_token_type_ids=False)) for text in texts
    ]
    np.testing.assert_allclose(lm.embed(texts), expected, atol=1e-5)
    ids = tokenizer(texts)["input_ids"]
    np.testing.assert_allclose(lm.embed(ids), expected, atol=1e-5)
    for wrong, message in (([""], "empty"), ([[10**6]], "outside of 0"), ([" "], "empty")):
        with pytest.raises(mm_jax.UserError, match=message):
            lm.embed(wrong)
    assert lm.embed([]).shape == (0, 32)
