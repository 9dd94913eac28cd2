"""Where in a picture the model looked when it chose a word.

Attention of the decoder to the pseudo-tokens of a picture, carried back to the patches that they were made of. It says
where information was fetched from, not why (Jain and Wallace 2019).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from einops import rearrange, repeat

from mm_jax.data.example import TAPS
from mm_jax.errors import UserError
from mm_jax.inference.batch import length_bucket
from mm_jax.inference.text import TextStream

if TYPE_CHECKING:
    from mm_jax.data.example import Example
    from mm_jax.data.image import Transform
    from mm_jax.data.messages import Message
    from mm_jax.lm import LanguageModel
    from mm_jax.models import ProjectorConfig

MOST_BYTES = 2 * 2**30  # of the decoder's attention: all layers and heads are there at once


@dataclass(frozen=True)
class Word:
    """A word, or a box, of an answer.

    Attributes:
      start, end: characters of the answer's text.
      tokens: ids of the answer.
    """

    text: str
    start: int
    end: int
    tokens: slice


@dataclass(frozen=True)
class Look:
    """How much of the decoder's attention a picture got.

    Attributes:
      image: number of the picture in the conversation.
      weights: float32 [rows, columns] of patches; their sum is the picture's share of all attention.
      area: x0, y0, x1, y1 that the patches cover, in pixels of the original; larger than it where it was padded.
    """

    image: int
    weights: np.ndarray
    area: tuple[float, float, float, float]

    def to_json(self) -> dict[str, Any]:
        rounded = [[float(f"{value:.3g}") for value in row] for row in self.weights]
        area = [round(value, 2) for value in self.area]
        share = float(f"{self.weights.sum():.3g}")
        return {"image": self.image, "share": share, "weights": rounded, "area": area}


def words_of(processor: Any, ids: Sequence[int], transforms: Sequence[Transform] = ()) -> list[Word]:
    """The words of an answer, of one or more tokens each; every id belongs to one.

    Args:
      ids: of the answer, without a stop token.
    """
    stream = TextStream(processor, transforms)
    words: list[Word] = []
    first = 0
    for k, token in enumerate(ids):
        before, new = len(stream.text), stream.push([token])
        if k + 1 == len(ids):
            new += stream.finish()
        if not new and k + 1 < len(ids):
            continue  # more tokens are needed to see what it is
        tokens, shown = slice(first, k + 1), new.strip()
        if words and (not new or not new[0].isspace()):  # the word goes on
            last = words[-1]
            text = stream.text[last.start :].rstrip()
            words[-1] = Word(text, last.start, last.start + len(text), slice(last.tokens.start, k + 1))
        else:
            start = before + len(new) - len(new.lstrip())
            words.append(Word(shown, start, start + len(shown), tokens))
        first = k + 1
    return words


def extended(prompt: Example, answer: Sequence[int]) -> Example:
    """A prompt with the ids of an answer behind it."""
    new = len(answer)

    def longer(array: np.ndarray, values: Any) -> np.ndarray:
        values = np.broadcast_to(np.asarray(values, array.dtype), (new, *array.shape[1:]))
        return np.concatenate([array, values])

    following = prompt.positions.max() + 1 + np.arange(new)
    return dataclasses.replace(
        prompt,
        tokens=longer(prompt.tokens, answer),
        loss_weights=longer(prompt.loss_weights, 1),
        segments=longer(prompt.segments, 1),
        positions=longer(prompt.positions, following[:, None] if prompt.positions.ndim > 1 else following),
        image_index=longer(prompt.image_index, -1),
        audio_index=longer(prompt.audio_index, -1),
        taps=None if prompt.taps is None else (longer(prompt.taps[0], 0), longer(prompt.taps[1], np.eye(TAPS)[0])),
    )  # fmt: skip


def reading_weights(projector: ProjectorConfig, sown: Mapping[str, Any]) -> np.ndarray:
    """How a projector's learned queries read the features: float32 [N, heads, queries, features].

    A Q-Former's layers are composed into one "head": after each the queries are half what they were and half what they
    have taken, of each other or of the features (attention rollout, Abnar and Zuidema 2020).

    Args:
      sown: the attention weights that the projector has left.
    """
    if projector.kind != "qformer":
        weights = np.asarray(sown["attention"]["attention_weights"][0])
        if projector.kind == "latent":  # the queries read each other as well
            weights = weights[..., : -projector.num_queries]
            weights /= weights.sum(axis=-1, keepdims=True)
        return weights
    count = projector.num_queries
    layers = {
        name: {kind: np.asarray(found["attention_weights"][0]).mean(axis=2) for kind, found in layer.items()}
        for name, layer in sown["layers"].items()
    }  # [groups, N, ...]
    read = 0.0
    for group in range(projector.num_layers // projector.cross_every):
        for k in range(projector.cross_every):
            layer = layers[f"layer{k}"]
            read = (read + layer["attention"][group][:, :count, :count] @ read) / 2 if group or k else read
            if "cross_attention" in layer:
                read = (read + layer["cross_attention"][group]) / 2
    return (read / read.sum(axis=-1, keepdims=True))[:, None]


def feature_weights(mean: np.ndarray, example: Example) -> np.ndarray:
    """The attention of tokens as that of the media features which they take.

    Args:
      mean: [T] of the prompt's tokens.

    Returns:
      float32 [features], up to the last one that is taken.
    """
    here = example.image_index >= 0
    if not here.any():
        return np.zeros(0, np.float32)
    index, mean = example.image_index[here][:, None], mean[: len(here)][here][:, None]
    shares = np.ones_like(mean)
    if example.taps is not None:
        index, shares = index + example.taps[0][here], example.taps[1][here]
        index = np.where(shares > 0, index, 0)
    found = np.zeros(index.max() + 1, np.float32)
    np.add.at(found, index, mean * shares)
    return found


def patch_weights(
    tokens: np.ndarray,
    projector: ProjectorConfig,
    grid: tuple[int, int],
    reading: np.ndarray | None = None,
) -> np.ndarray:
    """Weights of image tokens carried back to the patches that they were made of.

    A merging projector gives every patch of a token's block an equal share; learned queries pass their weight on by
    their own attention. A class token in front of the patches is left out.

    Args:
      tokens: [num_tokens].
      grid: (rows, columns) of patches.
      reading: [heads, queries, features] of this picture, see `reading_weights`.

    Returns:
      float32 [rows, columns] with the sum of `tokens`, but for the class token's share.
    """
    if reading is not None:
        flat = (tokens @ reading.mean(axis=0))[-grid[0] * grid[1] :]
        return rearrange(flat, "(r c) -> r c", r=grid[0]).astype(np.float32)
    a, b = projector.merge if projector.kind in ("linear", "mlp") else (1, 1)
    tokens = tokens[-(grid[0] // a) * (grid[1] // b) :]
    order = "(c r)" if projector.order == "columns" else "(r c)"
    blocks = rearrange(tokens, f"{order} -> r c", r=grid[0] // a) / (a * b)
    return repeat(blocks, "r c -> (r a) (c b)", a=a, b=b).astype(np.float32)


def looks(
    lm: LanguageModel, example: Example, answer: Sequence[int], words: Sequence[slice]
) -> list[list[Look]]:
    """Where the model looked for each word of an answer: one `Look` for each picture of the prompt.

    Mean over the decoder's layers and heads, and over the positions that predict the word's tokens.

    Args:
      example: the prompt.
      answer: its ids.
      words: which of them.

    Raises UserError: see `check_looks`.
    """
    check_looks(lm, example, len(answer))
    _, weights = lm.attention(example, answer)
    found = []
    for word in words:
        rows = [example.length - 1 + k for k in range(len(answer))[word]]
        if not rows:
            raise UserError("the answer has no such word")
        mean = weights["decoder"][:, :, rows].mean(axis=(0, 1, 2))
        features = feature_weights(mean, example)
        maps = _picture_weights(lm, example, features, weights.get("image_projector"))
        pairs = enumerate(zip(maps, _seen(lm, example), strict=True))
        found.append([Look(k, patches, area_of(transform)) for k, (patches, transform) in pairs])
    return found


def _seen(lm: LanguageModel, example: Example) -> list[Transform]:
    """Where the pictures are in those that the encoder gets; the boxes of a checkpoint may speak of others."""
    if lm.checkpoint is None:
        return example.transforms
    return [lm.processor.rule.framing(transform.original) for transform in example.transforms]


def words_json(
    lm: LanguageModel,
    example: Example,
    answer: Sequence[int],
    words: Sequence[Word],
    chosen: Iterable[int],
    draw: Callable[[int, Look], str] | None = None,
) -> list[dict[str, Any]]:
    """What `looks` finds for words of an answer, as JSON.

    Args:
      words: of `words_of`; chosen: numbers of those that are wanted; others than there are count for nothing.
      draw: makes the heat map of a word and says where it is.
    """
    numbers = [k for k in chosen if k < len(words)]
    found = looks(lm, example, answer, [words[k].tokens for k in numbers]) if numbers else []
    listed = []
    for k, seen in zip(numbers, found, strict=True):
        word, images = words[k], [look.to_json() for look in seen]
        for image, look in zip(images, seen, strict=True):
            if draw is not None:
                image["picture"] = draw(k, look)
        listed.append({"index": k, "text": word.text, "start": word.start, "end": word.end, "images": images})
    return listed


def check_looks(lm: LanguageModel, example: Example, new: int) -> None:
    """Whether `looks` can tell for a prompt and `new` tokens of an answer.

    Raises UserError: pictures in tiles, videos, and conversations whose attention is larger than MOST_BYTES.
    """
    count = len(example.transforms)
    if lm.config.patch_slots and count:
        segments = example.slots["patch_segment_ids"]
        if len(np.unique(segments[segments > 0])) != count:
            raise UserError("attention over patches is there for pictures, not for conversations with videos")
    elif example.num_images != count:
        raise UserError("attention over patches is there for pictures seen as a whole, not in tiles")
    c = lm.config.decoder
    size = 4 * c.num_layers * c.num_heads * length_bucket(example.length + new) ** 2
    if size > MOST_BYTES:
        raise UserError(
            f"attention of {example.length + new} tokens takes {size / 2**30:.1f} GiB, more than {MOST_BYTES / 2**30:g}"
        )


def _picture_weights(
    lm: LanguageModel, example: Example, features: np.ndarray, reading: np.ndarray | None
) -> list[np.ndarray]:
    """float32 [rows, columns] of each picture."""
    count, config = len(example.transforms), lm.config
    if not count:
        return []
    if config.patch_slots:
        return _native_weights(example, features, lm.layout.patches.merge)
    if config.native:
        positions, real = example.slots["patch_positions"], example.slots["patch_segment_ids"] > 0
    per = lm.layout.image_tokens
    features = np.pad(features, (0, count * per - len(features)))
    found = []
    for k in range(count):
        tokens, read = features[k * per : (k + 1) * per], None if reading is None else reading[k]
        if config.native:
            flat = (tokens @ read.mean(axis=0))[real[k]]
            found.append(_placed(flat, positions[k][real[k]]))
        else:
            grid = getattr(config.vision, "grid", None) or config.vision.feature_grid
            found.append(patch_weights(tokens, config.image_projector, grid, read))
    return found


def _native_weights(example: Example, features: np.ndarray, merge: int) -> list[np.ndarray]:
    """Of a tower of native resolution, where slots are patches and pictures are numbered."""
    segments, positions = example.slots["patch_segment_ids"], example.slots["patch_positions"]
    pictures = np.unique(segments[segments > 0])
    features = np.pad(features, (0, -(-len(segments) // merge**2) - len(features)))
    patches = np.repeat(features / merge**2, merge**2)[: len(segments)]
    return [_placed(patches[segments == k], positions[segments == k]) for k in pictures]


def _placed(weights: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[P] at int [P, 2] as a grid."""
    grid = np.zeros(positions.max(axis=0) + 1, np.float32)
    np.add.at(grid, tuple(positions.T), weights)
    return grid


def area_of(transform: Transform) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 in original pixels of what the model's picture shows, padding included."""
    (sx, sy), (dx, dy), (width, height) = transform.scale, transform.offset, transform.size
    return (-dx / sx, -dy / sy, (width - dx) / sx, (height - dy) / sy)


def to_original(look: Look, size: tuple[int, int]) -> np.ndarray:
    """Patch weights as a map over the original picture: float32 [height, width], largest value 1.

    Each original pixel takes the patch that its centre falls on; what lies on padding is not part of the original and
    drops out.

    Args:
      size: (width, height) of the original.
    """
    rows, cols = look.weights.shape
    x0, y0, x1, y1 = look.area
    x = (np.arange(size[0]) + 0.5 - x0) / (x1 - x0) * cols
    y = (np.arange(size[1]) + 0.5 - y0) / (y1 - y0) * rows
    inside = ((x >= 0) & (x < cols))[None] & ((y >= 0) & (y < rows))[:, None]
    columns, lines = np.clip(x, 0, cols - 1).astype(int), np.clip(y, 0, rows - 1).astype(int)
    full = np.where(inside, look.weights[lines][:, columns], 0)
    top = full.max(initial=0)
    return (full / top if top > 0 else full).astype(np.float32)


def attention_map(
    lm: LanguageModel,
    messages: Sequence[Message | dict],
    answer: Sequence[int],
    word: slice = slice(0, 1),
    image: int = 0,
) -> np.ndarray:
    """A heat map over a picture for a word of an answer.

    Args:
      messages: the prompt.
      answer: ids of the answer.
      word: which of them.
      image: number of the picture in the conversation.

    Returns:
      float32 [height, width] in original pixels, 0..1.

    Raises UserError: no such picture or word, or see `looks`.
    """
    prompt = lm.prompt(messages)
    if image >= len(prompt.transforms):
        raise UserError(f"picture {image} asked for, but the conversation has {len(prompt.transforms)}")
    return to_original(looks(lm, prompt, answer, [word])[0][image], prompt.transforms[image].original)


def heat_picture(picture: PIL.Image.Image, look: Look, side: int = 1024) -> PIL.Image.Image:
    """The picture with what was looked at, made smaller where it is longer than `side`."""
    factor = min(1.0, side / max(picture.size))
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    look = dataclasses.replace(look, area=tuple(factor * value for value in look.area))
    return overlay(small, to_original(look, small.size))


def overlay(picture: PIL.Image.Image, heat: np.ndarray, strength: float = 0.65) -> PIL.Image.Image:
    """The picture in grey with the heat map over it, from blue (least) over red to yellow (most)."""
    stops = np.array([[30, 40, 110], [200, 40, 90], [255, 225, 80]], np.float32)
    at = np.clip(heat, 0, 1) * 2
    low = np.minimum(at.astype(int), 1)
    share = (at - low)[..., None]
    colour = stops[low] * (1 - share) + stops[low + 1] * share
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    return PIL.Image.fromarray(((1 - strength) * grey + strength * colour).round().astype(np.uint8))
