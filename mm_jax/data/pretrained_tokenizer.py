"""The tokenizer of a Hugging Face directory: tokenizer.json with what its config files add."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from mm_jax.data import tiktoken
from mm_jax.errors import UserError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")


class PretrainedTokenizer:
    """Text to ids and back as transformers' fast tokenizers do it. Picklable.

    Unlike in `mm_jax.data.tokenizer.Tokenizer`, special tokens that are spelt out in a text become their ids, because
    chat templates write them so.

    Args:
      backend: of tokenizer.json.
      config: tokenizer_config.json, with special_tokens_map.json and added_tokens.json of older files merged in.

    Attributes:
      named: the special tokens by their names, such as {"bos_token": "<s>"}; chat templates use them.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]):
        self.backend, self.config = backend, dict(config)
        self.named = {name: _content(config[name]) for name in NAMED if config.get(name) is not None}
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        self._add_tokens()
        # flags in the config, or a file that says nothing, take the place of what the file adds around a text
        explicit = "add_bos_token" in config or "add_eos_token" in config
        self._around: tuple[bool, bool] | None = None
        if explicit or backend.post_processor is None:
            self._around = (bool(config.get("add_bos_token")), bool(config.get("add_eos_token")))

    def _add_tokens(self) -> None:
        known = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        listed = sorted(self.config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
        tokens = [_added(value) for _, value in listed]
        tokens += [_added(self.config[name]) for name in self.named]
        for name in EXTRA:
            values = self.config.get(name) or ()
            tokens += [_added(v) for v in (values.values() if isinstance(values, Mapping) else values)]
        special = set(self.named.values())
        for token in tokens:
            if token.content not in known:
                known.add(token.content)
                token.special = token.special or token.content in special
                self.backend.add_tokens([token])

    def add(self, tokens: Sequence[str]) -> None:
        """Special tokens that the tokenizer is to have besides; those that it has stay as they are."""
        self.backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])

    @property
    def size(self) -> int:
        """The largest id, plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, around: bool = False) -> tuple[int, ...]:
        """Ids of a text.

        Args:
          around: with the tokens that this tokenizer puts around a text, such as one for its beginning.
        """
        return self.encode_places(text, around)[0]

    def encode_places(self, text: str, around: bool = False) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """`encode`, and the (start, end) of each token in the text; (0, 0) for those around it."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        found = self.backend.encode(text, add_special_tokens=around and self._around is None)
        if self._around is None or not around:
            return tuple(found.ids), found.offsets
        begin, end = (
            (self.id(self.named[name]),) if wanted and name in self.named else ()
            for name, wanted in zip(("bos_token", "eos_token"), self._around, strict=True)
        )
        nowhere = (0, 0)
        return (*begin, *found.ids, *end), [nowhere] * len(begin) + found.offsets + [nowhere] * len(end)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of ids; special tokens are left out unless `special`."""
        return self.backend.decode([int(k) for k in ids], skip_special_tokens=not special)

    def id(self, token: str) -> int:
        """The id of a token by its text. Raises UserError if there is none."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise UserError(f'the tokenizer has no token "{token}"')
        return found

    def keeping(self, pattern: str) -> PretrainedTokenizer:
        """One that leaves special tokens which match the regular expression in the texts that it decodes."""
        known = self.backend.get_added_tokens_decoder().values()
        if not any(token.special and re.fullmatch(pattern, token.content) for token in known):
            return self
        state = json.loads(self.backend.to_str())
        for token in state["added_tokens"]:
            token["special"] = token["special"] and not re.fullmatch(pattern, token["content"])
        return PretrainedTokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), self.config)

    @classmethod
    def load(cls, directory: str | Path) -> PretrainedTokenizer:
        """Raises UserError for a missing or damaged file."""
        directory = Path(directory)
        path, old = directory / "tokenizer.json", directory / tiktoken.FILE
        if not path.is_file() and old.is_file():
            return cls(
                tiktoken.tokenizer_of(tiktoken.read_ranks(old)), _read(directory / "tokenizer_config.json")
            )
        if not path.is_file():
            raise UserError(
                f"{directory} has no tokenizer.json; AutoTokenizer.from_pretrained(...).save_pretrained(...) of "
                "transformers writes one from the older files"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer file ({' '.join(str(error).split())})") from None
        config = _read(directory / "tokenizer_config.json")
        for name, value in _read(directory / "special_tokens_map.json").items():
            config.setdefault(name, value)
        if "added_tokens_decoder" not in config:
            added = _read(directory / "added_tokens.json")
            config["added_tokens_decoder"] = {str(k): {"content": name} for name, k in added.items()}
        return cls(backend, config)

    def __getstate__(self) -> tuple[str, dict[str, Any]]:
        return self.backend.to_str(), self.config

    def __setstate__(self, state: tuple[str, dict[str, Any]]) -> None:
        self.__init__(tokenizers.Tokenizer.from_str(state[0]), state[1])


def token_id(directory: str | Path, token: str) -> int | None:
    """The id of an added token in a directory's files, None where it is in none of them."""
    directory = Path(directory)
    found = _read(directory / "added_tokens.json").get(token)
    listed = _read(directory / "tokenizer_config.json").get("added_tokens_decoder", {})
    ids = [int(k) for k, value in listed.items() if _content(value) == token]
    ids += [
        value["id"]
        for value in _read(directory / "tokenizer.json").get("added_tokens", ())
        if value["content"] == token
    ]
    return found if found is not None else next(iter(ids), None)


def _content(value: str | Mapping[str, Any]) -> str:
    return value if isinstance(value, str) else value["content"]


def _added(value: str | Mapping[str, Any]) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    fields = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{name: value[name] for name in fields if name in value})


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
