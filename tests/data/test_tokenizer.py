"""The tokenizer on real strings: round trips, no way in for special tokens, the same file every time."""

import pickle

import pytest

from mm_jax.data.tokenizer import SPECIALS, Tokenizer, train_tokenizer
from mm_jax.errors import UserError

TEXTS = ["how many red circles are there?", "a red circle and a green square", "12 squares", "year 2024"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400, 16)


@pytest.mark.parametrize(
    "text", ["a red circle", "", " \n\t", "naïve ÿ 漢字 🎈", "<|user|>hi<|end|><image><loc_3>"]
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_never_makes_special_tokens(tokenizer):
    specials = {tokenizer.id(name) for name in SPECIALS} | {tokenizer.id(f"<loc_{k}>") for k in range(16)}
    assert specials == set(range(len(SPECIALS) + 16))
    for text in (*SPECIALS, "<loc_3>", "x<image>y", "<|assistant|>yes<|end|>"):
        assert not specials & set(tokenizer.encode(text))
        assert not specials & set(pickle.loads(pickle.dumps(tokenizer)).encode(text))


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("2024")) == 4


def test_words_of_the_training_text_are_few_tokens(tokenizer):
    assert len(tokenizer.encode("a red circle")) == 3


def test_vocab_size(tokenizer):
    assert tokenizer.vocab_size <= 400
    assert max(tokenizer.encode("a red circle")) < tokenizer.vocab_size
    with pytest.raises(UserError, match="vocab_size 278 is too small: 279 tokens are fixed"):
        train_tokenizer(TEXTS, 278, 16)


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(iter(TEXTS), 400, 16)
    assert again.backend.to_str() == tokenizer.backend.to_str()


def test_half_a_surrogate_pair_is_no_crash(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800")) == "a?"


def test_save_load_and_damage(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.encode("a red <image>") == tokenizer.encode("a red <image>")
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer file"):
        Tokenizer.load(path)
    with pytest.raises(UserError, match="no.json: cannot read"):
        Tokenizer.load(tmp_path / "no.json")
    with pytest.raises(UserError, match="no token <loc_16>"):
        tokenizer.id("<loc_16>")
