"""What a file of `mm_jax.families` says about a system."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.models import DecoderConfig, MultimodalConfig, ViTConfig

LINEAR = "o i -> i o"  # a linear map of the reference is [out, in], ours [in, out]


@dataclass(frozen=True)
class Weight:
    """One of the reference's tensors and the place of its values in our parameters.

    Attributes:
      name: theirs; "{}" stands for the number of a layer, and ours then has a leading axis of layers.
      path: ours, such as "decoder/layers/attention/query/kernel".
      pattern: einops pattern from theirs to ours, without the axis of layers; "" for equal arrays. It is read
        backwards to save.
      sizes: lengths of the axes that the pattern takes apart when it is read backwards.
    """

    name: str
    path: str
    pattern: str = ""
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    def ours(self, array: np.ndarray) -> np.ndarray:
        """Their array (of one layer) as ours; a view where it can be."""
        return rearrange(array, self.pattern, **dict(self.sizes)) if self.pattern else array

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array (of one layer) as theirs."""
        before, _, after = self.pattern.partition("->")
        return rearrange(array, f"{after} -> {before}", **dict(self.sizes)) if self.pattern else array


@dataclass(frozen=True)
class Text:
    """What a text config says.

    Attributes:
      max_length: tokens that the decoder was made for.
      stop_ids: the tokens that end an answer, unless generation_config.json says otherwise.
      pad_id: of padding; None where there is no such token.
    """

    decoder: DecoderConfig
    max_length: int
    stop_ids: tuple[int, ...] = ()
    pad_id: int | None = None


@dataclass(frozen=True)
class System:
    """A checkpoint as its config.json describes it.

    Attributes:
      config: of a language model, or of a tower alone.
      weights: every parameter of the model.
      text: None for a tower.
      unused: name patterns (as of `fnmatch`) of tensors that the model does not compute with. They are kept, and
        written back on saving.
      image_token_id: the token that stands for one image feature.
    """

    config: MultimodalConfig | ViTConfig
    weights: tuple[Weight, ...]
    text: Text | None = None
    unused: tuple[str, ...] = ()
    image_token_id: int | None = None


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one model_type are read.

    Attributes:
      name: the model_type in config.json.
      takes: "text" and the media that a prompt may hold.
      system: (config.json, names of the tensors) -> System. Raises UserError for a field that changes the numbers and
        is not supported.
      renames: (regular expression, replacement) pairs, applied in order: other spellings of a tensor's name to
        the one in `System.weights`, which is the one that is written.
    """

    name: str
    takes: tuple[str, ...]
    system: Callable[[Mapping[str, Any], frozenset[str]], System]
    renames: tuple[tuple[str, str], ...] = ()
