"""Where in a picture the model looked when it chose a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from einops import rearrange, repeat

from mm_jax.errors import UserError

if TYPE_CHECKING:
    from mm_jax.data.image import Transform
    from mm_jax.data.messages import Message
    from mm_jax.lm import LanguageModel
    from mm_jax.models import ProjectorConfig


def token_weights(
    decoder: np.ndarray, queries: Sequence[int], image_index: np.ndarray, first: int, count: int
):
    """How much attention the image tokens of one picture get, mean over layers, heads and queries.

    Args:
      decoder: [layers, heads, S, S], probabilities.
      queries: rows to look from: those before the tokens of the word, as they chose it.
      image_index: int [T], feature of each prompt token, -1 for none.
      first, count: the features of the picture, first .. first + count - 1.

    Returns:
      float32 [count].
    """
    mean = decoder[:, :, list(queries)].mean(axis=(0, 1, 2))
    weights = np.zeros(count, np.float32)
    here = np.flatnonzero((image_index >= first) & (image_index < first + count))
    weights[image_index[here] - first] = mean[here]
    return weights


def patch_weights(
    tokens: np.ndarray,
    projector: ProjectorConfig,
    grid: tuple[int, int],
    resampler: np.ndarray | None = None,
) -> np.ndarray:
    """Weights of image tokens carried back to the patches that they were made of.

    A merging projector gives every patch of a token's block an equal share; a resampler's queries pass their
    weight on by their own attention.

    Args:
      tokens: [num_tokens].
      grid: (rows, columns) of patches.
      resampler: [heads, queries, patches] of this picture, for a resampler.

    Returns:
      float32 [rows, columns] with the sum of `tokens`.
    """
    if projector.kind == "resampler":
        return rearrange(tokens @ resampler.mean(axis=0), "(r c) -> r c", r=grid[0]).astype(np.float32)
    a, b = projector.merge
    blocks = rearrange(tokens, "(r c) -> r c", r=grid[0] // a) / (a * b)
    return repeat(blocks, "r c -> (r a) (c b)", a=a, b=b).astype(np.float32)


def to_original(patches: np.ndarray, transform: Transform) -> np.ndarray:
    """Patch weights as a map over the original picture: float32 [height, width], largest value 1.

    Each original pixel takes the patch that its centre falls on in the model's picture; what lies on padding
    is not part of the original and drops out.
    """
    rows, cols = patches.shape
    (width, height), (sx, sy), (dx, dy) = transform.original, transform.scale, transform.offset
    x = ((np.arange(width) + 0.5) * sx + dx) / transform.size[0] * cols
    y = ((np.arange(height) + 0.5) * sy + dy) / transform.size[1] * rows
    inside = ((x >= 0) & (x < cols))[None] & ((y >= 0) & (y < rows))[:, None]
    columns, lines = np.clip(x, 0, cols - 1).astype(int), np.clip(y, 0, rows - 1).astype(int)
    full = np.where(inside, patches[lines][:, columns], 0)
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

    Attention of the positions that predict the tokens answer[word], mean over heads and layers, from image
    tokens to patches to pixels. Attention says where information was fetched from, not why (Jain and Wallace
    2019).

    Args:
      messages: the prompt.
      answer: ids of the answer.
      image: number of the picture in the conversation.

    Returns:
      float32 [height, width] in original pixels, 0..1.
    """
    prompt, weights = lm.attention(messages, answer)
    if image >= prompt.num_images:
        raise UserError(f"picture {image} asked for, but the conversation has {prompt.num_images}")
    chosen = range(len(answer))[word]
    if not chosen:
        raise UserError("the answer has no such word")
    queries = [prompt.length - 1 + k for k in chosen]
    count = lm.layout.image_tokens
    tokens = token_weights(weights["decoder"], queries, prompt.image_index, image * count, count)
    sown = weights.get("image_projector")
    resampler = None if sown is None else sown[image]
    patches = patch_weights(tokens, lm.config.image_projector, lm.config.vision.grid, resampler)
    return to_original(patches, prompt.transforms[image])


def overlay(picture: PIL.Image.Image, heat: np.ndarray, strength: float = 0.65) -> PIL.Image.Image:
    """The picture in grey with the heat map over it, from blue (least) over red to yellow (most)."""
    stops = np.array([[30, 40, 110], [200, 40, 90], [255, 225, 80]], np.float32)
    at = np.clip(heat, 0, 1) * 2
    low = np.minimum(at.astype(int), 1)
    share = (at - low)[..., None]
    colour = stops[low] * (1 - share) + stops[low + 1] * share
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    return PIL.Image.fromarray(((1 - strength) * grey + strength * colour).round().astype(np.uint8))
