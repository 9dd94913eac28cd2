"""Byte-level BPE whose special tokens only code can write, never a user's text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mm_jax.data.boxes import BoxFormat
from mm_jax.errors import UserError

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
IMAGE, AUDIO = "<image>", "<audio>"
SPECIALS = (PAD, SYSTEM, USER, ASSISTANT, END, IMAGE, AUDIO)


def spaced(text: str) -> str:
    """The text with a space before a letter at its start, so that a word is the same token there and inside a text.

    >>> spaced("red"), spaced("3 red")
    (' red', '3 red')
    """
    return f" {text}" if text[:1].isalpha() else text


class Tokenizer:
    """Text to ids and back over a `tokenizers.Tokenizer`. Picklable; short texts that repeat are cached.

    Ids: the special tokens from 0, then the location tokens, then bytes and merges.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        # without it the text "<image>" would become the placeholder's id
        backend.encode_special_tokens = True
        self._encode_cached = lru_cache(maxsize=65536)(self._encode)
        for name in SPECIALS:
            if backend.token_to_id(name) is None:
                raise UserError(f"the tokenizer has no special token {name}")

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of plain text; never one of the special tokens."""
        # questions and answers repeat, documents do not and would fill the memory
        return self._encode_cached(text) if len(text) <= 256 else self._encode(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        # JSON may hold half of a surrogate pair ("\ud800"), which is no text and has no bytes
        text = text.encode("utf-8", "replace").decode("utf-8")
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special and location tokens are left out."""
        return self.backend.decode([int(k) for k in ids], skip_special_tokens=True)

    def id(self, token: str) -> int:
        """The id of a token by its name. Raises UserError if there is none."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise UserError(f"the tokenizer has no token {token}")
        return found

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.backend.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Raises UserError for a missing or damaged file."""
        try:
            return cls.from_str(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot read the tokenizer ({error.strerror})") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_str(cls, text: str) -> Tokenizer:
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"not a tokenizer file ({' '.join(str(error).split())})") from None
        return cls(backend)

    def __getstate__(self) -> str:
        return self.backend.to_str()

    def __setstate__(self, state: str) -> None:
        self.__init__(tokenizers.Tokenizer.from_str(state))


def train_tokenizer(texts: Iterable[str], vocab_size: int, box_bins: int) -> Tokenizer:
    """A byte-level BPE of at most vocab_size tokens (specials, location tokens, 256 bytes, merges).

    Digits stay single tokens, so a number is read and written digit by digit. The same texts give the same
    tokenizer. Raises UserError if vocab_size has no room for the fixed tokens.
    """
    specials = [*SPECIALS, *BoxFormat.names(box_bins)]
    fixed = len(specials) + 256
    if vocab_size < fixed:
        text = f"vocab_size {vocab_size} is too small: {fixed} tokens are fixed (specials, boxes, bytes)"
        raise UserError(text)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
