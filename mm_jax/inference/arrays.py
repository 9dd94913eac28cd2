"""Batches from the arrays that the reference's processor returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from mm_jax.data.media_rule import MediaRule
from mm_jax.data.packing import BatchConfig, Layout, collate
from mm_jax.data.pretrained import Items, assemble
from mm_jax.errors import UserError, nearest
from mm_jax.inference.batch import TOKEN_KEYS, TRAIN_KEYS
from mm_jax.models import MultimodalConfig

TEXT = ("input_ids", "attention_mask", "position_ids")


def batch_of(
    config: MultimodalConfig, rule: MediaRule, layout: Layout, arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """A batch for `MultimodalLM` whose logits are aligned with input_ids.

    Args:
      rule: says which media arrays there are and what becomes of them.
      arrays: input_ids int [B, S]; attention_mask [B, S], 0 for padding on either side; the media arrays of the
        reference's processor, pictures and clips in the order of their tokens in the rows; position_ids [B, S], or
        [3, B, S] for M-RoPE, in place of those that follow from the other arrays; token_type_ids [B, S] where the
        prefix is read both ways: 0 for it, which is everything without them.

    Raises UserError: unknown names, shapes that disagree, tokens outside the vocabulary, or media whose tokens are not
    those in the rows.
    """
    rule, arrays = rule.prepared(arrays)
    known = [*TEXT, *(name for kind in rule.tokens if kind not in rule.shared for name in rule.names[kind])]
    for name in arrays:
        if name not in known and name not in rule.ignored:
            raise UserError(f'a batch of this model takes no "{name}"{nearest(name, known)}')
    if "input_ids" not in arrays:
        raise UserError("a batch of arrays needs at least input_ids [B, S]")
    ids = np.asarray(arrays["input_ids"])
    if ids.ndim != 2:
        raise UserError(f"input_ids has shape {list(ids.shape)}, [rows, length] is needed")
    real = np.asarray(arrays.get("attention_mask", np.ones_like(ids))).astype(bool)
    if real.shape != ids.shape:
        raise UserError(f"attention_mask has shape {list(real.shape)}, input_ids {list(ids.shape)}")
    ids = rule.marked(ids, arrays)
    vocab = config.decoder.vocab_size + config.decoder.extra_tokens
    words = ids[~np.isin(ids, list(rule.tokens.values()))]  # a media token may be no word of the decoder's
    if words.size and not 0 <= words.min() <= words.max() < vocab:
        raise UserError(
            f"input_ids holds {words.min()} to {words.max()}, the vocabulary has 0 to {vocab - 1}"
        )
    answers = np.asarray(arrays.get("token_type_ids", np.zeros_like(ids))) * (config.two_way == "prefix")
    rows = [row[mask].astype(np.int32) for row, mask in zip(ids, real, strict=True)]
    media = _media_of_rows(rule, rows, arrays)
    weights = [row[mask].astype(np.float32) for row, mask in zip(answers, real, strict=True)]
    examples = [
        assemble(rule, row, items, weights=trained)
        for row, items, trained in zip(rows, media, weights, strict=True)
    ]
    size = BatchConfig(
        rows=len(rows),
        length=max(ids.shape[1], 1),
        images=max(e.num_images for e in examples),
        audio=max(e.num_audio for e in examples),
    )
    batch = collate([[e] if e.length else [] for e in examples], size, layout, {"": 0})
    batch = {key: array for key, array in batch.items() if key not in TRAIN_KEYS}
    for key in batch.keys() & set(TOKEN_KEYS):  # back from the start of each row to where its tokens were
        packed, fill = batch[key], -1 if key == "media_index" else 0
        batch[key] = np.full((*ids.shape, *packed.shape[2:]), fill, packed.dtype)
        batch[key][real] = packed[np.sort(real, axis=1)[:, ::-1]]
    if "seen" in batch and (seen := rule.given_seen(arrays, ids.shape)) is not None:
        batch["seen"] = seen
    batch["tokens"] = np.where(ids < vocab, ids, 0).astype(np.int32)
    if arrays.get("position_ids") is not None:
        batch["positions"] = _positions(np.asarray(arrays["position_ids"]), batch["positions"].shape)
    return batch


def _positions(position_ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """As `shape` says: [B, S], or [B, S, 3] of [3, B, S] or, with those of text in front, [4, B, S]."""
    positions = position_ids.astype(np.int32)
    if len(shape) == 3 and positions.ndim == 3:
        positions = rearrange(positions[-3:], "a b s -> b s a")
    if positions.shape != shape:
        needed = list(shape) if len(shape) == 2 else [3, *shape[:2]]
        raise UserError(f"position_ids has shape {list(position_ids.shape)}, {needed} is needed")
    return positions


def _media_of_rows(rule: MediaRule, rows: Sequence[np.ndarray], arrays: Mapping[str, Any]) -> list[Items]:
    """The items of each row, counted off by its media tokens."""
    found: list[Items] = [{} for _ in rows]
    for kind, token in rule.tokens.items():
        if kind in rule.shared:
            continue
        counts = [int((row == token).sum()) for row in rows]
        given = {n: np.asarray(arrays[n]) for n in rule.names[kind] if arrays.get(n) is not None}
        if not given:
            if any(counts):
                needed = " and ".join(rule.names[kind])
                raise UserError(f"{sum(counts)} {kind} tokens in input_ids, but there are no {needed}")
            continue
        if (by_row := rule.by_row(given, counts)) is not None:
            for row, items in zip(found, by_row, strict=True):
                row[kind] = items
            continue
        items = rule.items(kind, given, counts)
        taken = [len(item.index) for item in items]
        at = 0
        for row, count in enumerate(counts):
            end = at
            while end < len(items) and sum(taken[at:end]) < count:
                end += 1
            if sum(taken[at:end]) != count:
                break
            found[row][kind] = items[at:end]
            at = end
        if at != len(items) or sum(counts) != sum(taken):
            some = ", ".join(map(str, taken[:8])) + (", ..." if len(taken) > 8 else "")
            raise UserError(
                f"{len(items)} {kind}s take {some} tokens, but the rows of input_ids have {counts} {kind} tokens"
            )
    return found
