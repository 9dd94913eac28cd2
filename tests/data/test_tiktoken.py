"""Tokenizers of tiktoken's files, against the rule by which they join bytes."""

import base64
import pickle

import numpy as np
import pytest

from mm_jax.data.pretrained_tokenizer import PretrainedTokenizer
from mm_jax.data.tiktoken import FILE, PIECES, SPECIALS
from mm_jax.errors import UserError

WORDS = [
    "the",
    "then",
    "hen",
    "in",
    "inn",
    "nth",
    "é",
    "naï",
    "图片",
    "  ",
    "\n\n",
    "!!",
    "'re",
    " a",
    " the",
    "re",
]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """All bytes, and words with all their beginnings in random order, so that many splits are possible."""
    random, found = np.random.default_rng(0), {bytes([k]): k for k in range(256)}
    parts = [w.encode()[:k] for w in WORDS for k in range(2, len(w.encode()) + 1)]
    parts += [w.encode()[-2:] for w in WORDS]
    for k in random.permutation(len(parts)):
        found.setdefault(parts[k], len(found))
    return found


@pytest.fixture
def tokenizer(ranks, tmp_path):
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (tmp_path / FILE).write_bytes(b"\n".join(lines) + b"\n")
    return PretrainedTokenizer.load(tmp_path)


def joined(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    parts = [piece[k : k + 1] for k in range(len(piece))]
    while True:
        pairs = [
            (ranks[a + b], k)
            for k, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if a + b in ranks
        ]
        if not pairs:
            return [ranks[part] for part in parts]
        _, k = min(pairs)
        parts[k : k + 2] = [parts[k] + parts[k + 1]]


def test_the_rule(tokenizer, ranks):
    regex = pytest.importorskip("regex")
    random = np.random.default_rng(1)
    texts = ["".join(random.choice([*WORDS, " ", "x", "7", "\n", "."], 12)) for _ in range(200)]
    for text in [*texts, "I'LL say 123 inns!\r\n  (then)", "cafe\u0301 图片"]:
        ids = tokenizer.encode(text)
        plain = text.replace("e\u0301", "é")
        assert list(ids) == [
            i for piece in regex.findall(PIECES, plain) for i in joined(piece.encode(), ranks)
        ]
        assert tokenizer.decode(ids) == plain


def test_special_tokens(tokenizer, ranks):
    assert [tokenizer.id(name) for name in SPECIALS] == list(range(len(ranks), len(ranks) + len(SPECIALS)))
    assert SPECIALS.index("<img>") + 151_643 == 151_857  # as the released config.json has it
    ids = pickle.loads(pickle.dumps(tokenizer)).encode("<ref>the</ref>")
    assert ids == (tokenizer.id("<ref>"), *tokenizer.encode("the"), tokenizer.id("</ref>"))
    assert tokenizer.decode(ids) == "the"


@pytest.mark.parametrize(
    "text, message", [("dGhl", "line 1"), ("dGhl 0\n!! 1", "line 2"), ("dGhl 5", "not 0 to 0")]
)
def test_damaged_files(text, message, tmp_path):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=message):
        PretrainedTokenizer.load(tmp_path)
