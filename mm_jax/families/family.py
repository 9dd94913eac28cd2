"""What a file of `mm_jax.families` says about a system."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.data.media_rule import MediaRule, Settings
from mm_jax.models import DecoderConfig, EncoderConfig, MultimodalConfig

LINEAR = "o i -> i o"  # a linear map of the reference is [out, in], ours [in, out]
CONV = "o i k -> k i o"  # a convolution over time
POINT = "o i 1 -> i o"  # one of a single position, which is a linear map


@dataclass(frozen=True)
class Part:
    """Which part of a tensor of theirs a parameter of ours is: query, key and value are often one tensor.

    Attributes:
      start, stop: along the first axis after `pattern`.
      total: length of that axis; the parts of one tensor fill it.
      pattern: einops pattern that brings the axis to be cut to the front; "" where it is there.
      sizes: lengths of the axes that the pattern takes apart.
    """

    start: int
    stop: int
    total: int
    pattern: str = ""
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Weight:
    """One of the reference's tensors and the place of its values in our parameters.

    Attributes:
      name: theirs; "{}" stands for the number of a layer, and ours then has a leading axis of layers. A second
        one stands for the number of an expert.
      path: ours, such as "decoder/layers/attention/query/kernel".
      pattern: einops pattern from theirs to ours, without the axis of layers; "" for equal arrays. It is read
        backwards to save.
      sizes: lengths of the axes that the pattern takes apart when it is read backwards.
      part: the part of their tensor that `pattern` then starts from; None for all of it.
      first, step: the layers along our leading axis are first, first + step, first + 2 * step, ...
    """

    name: str
    path: str
    pattern: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    part: Part | None = None
    first: int = 0
    step: int = 1

    @property
    def depth(self) -> int:
        """Leading axes of ours that number tensors of theirs."""
        return self.name.count("{}")

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """Their tensors behind our array of `shape`."""
        found = np.ndindex(shape[: self.depth])
        return [
            self.name.format(*(self.first + self.step * k for k in index[:1]), *index[1:]) for index in found
        ]

    def ours(self, array: np.ndarray) -> np.ndarray:
        """Their array (of one layer) as ours; a view where it can be."""
        if self.part is not None:
            array = _forwards(array, self.part.pattern, self.part.sizes)[self.part.start : self.part.stop]
        return _forwards(array, self.pattern, self.sizes)

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array (of one layer) as theirs, or as the part of theirs that `joined` takes."""
        return _backwards(array, self.pattern, self.sizes)

    def joined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Their array of the parts that `theirs` gives, in order; this weight is the one of any of them."""
        if self.part is None:
            return parts[0]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return _backwards(whole, self.part.pattern, self.part.sizes)

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one of their arrays where ours, of all layers, has `shape`."""
        part = self.theirs(np.broadcast_to(np.int8(0), shape[self.depth :]))
        if self.part is not None:
            part = np.broadcast_to(np.int8(0), (self.part.total, *part.shape[1:]))
        return self.joined([part]).shape


def _forwards(array: np.ndarray, pattern: str, sizes: tuple[tuple[str, int], ...]) -> np.ndarray:
    return rearrange(array, pattern, **dict(sizes)) if pattern else array


def _backwards(array: np.ndarray, pattern: str, sizes: tuple[tuple[str, int], ...]) -> np.ndarray:
    before, _, after = pattern.partition("->")
    return rearrange(array, f"{after} -> {before}", **dict(sizes)) if pattern else array


class Names(frozenset[str]):
    """The names of a checkpoint's tensors.

    Attributes:
      shapes: of those whose shapes are known.
    """

    shapes: Mapping[str, tuple[int, ...]] = {}

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Names:
        names = cls(shapes)
        names.shapes = shapes
        return names


def linear(
    theirs: str, ours: str, bias: bool = True, pattern: str = LINEAR, sizes: tuple[tuple[str, int], ...] = ()
) -> list[Weight]:
    """A linear map or convolution."""
    kernel = Weight(f"{theirs}.weight", f"{ours}/kernel", pattern, sizes)
    return [kernel, Weight(f"{theirs}.bias", f"{ours}/bias")] if bias else [kernel]


def norm(theirs: str, ours: str) -> list[Weight]:
    """A norm with factors and offsets."""
    return [Weight(f"{theirs}.weight", f"{ours}/scale"), Weight(f"{theirs}.bias", f"{ours}/bias")]


@dataclass(frozen=True)
class Text:
    """What a text config says.

    Attributes:
      weights: (config, how the names of the model's tensors begin, how that of the head begins) -> the table.
      max_length: tokens that the decoder was made for.
      stop_ids: the tokens that end an answer, unless generation_config.json says otherwise.
      pad_id: of padding; None where there is no such token.
    """

    decoder: DecoderConfig
    weights: Callable[[DecoderConfig, str, str], tuple[Weight, ...]]
    max_length: int
    stop_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def table(self, model: str = "model.", head: str = "lm_head.") -> tuple[Weight, ...]:
        """The tensors of this decoder whose names begin with `model` and `head`."""
        return self.weights(self.decoder, model, head)


@dataclass(frozen=True)
class System:
    """A checkpoint as its config.json describes it.

    Attributes:
      config: of a language model, or of a tower alone.
      weights: every parameter of the model.
      text: None for a tower.
      unused: name patterns (as of `fnmatch`) of tensors that the model does not compute with. They are kept, and
        written back on saving.
      image_token_id: the token that stands for one feature of a picture.
      rule: from the files of the checkpoint's directory to how its media become arrays and tokens; None for what
        `mm_jax.families.media.media_rule` makes of the config, which takes arrays and, of encoders for pictures of
        one size, pictures.
      template: chat template, for a checkpoint that has none.
      stops: tokens that end an answer besides those that generation_config.json names.
      template_first: the reference's own code writes messages so, whatever template the files of the tokenizer have.
      takes: of a tower, the names of the arrays that the reference's takes; the first is needed.
      inputs: of a tower, (config, those arrays) -> the arguments of our module by name; None for pictures of one size.
    """

    config: MultimodalConfig | EncoderConfig
    weights: tuple[Weight, ...]
    text: Text | None = None
    unused: tuple[str, ...] = ()
    image_token_id: int | None = None
    rule: Callable[[Settings], MediaRule] | None = None
    template: str | None = None
    stops: tuple[int, ...] = ()
    template_first: bool = False
    takes: tuple[str, ...] = ("pixel_values",)
    inputs: Callable[[Any, Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None = None


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
    system: Callable[[Mapping[str, Any], Names], System]
    renames: tuple[tuple[str, str], ...] = ()
