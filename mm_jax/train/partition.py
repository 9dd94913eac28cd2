"""Which parameters a stage moves: nested param dicts split and joined by regex on their paths."""

import re
from collections.abc import Collection
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from mm_jax.errors import UserError, nearest


def matching(paths: Collection[str], patterns: tuple[str, ...], field: str) -> set[str]:
    """The paths that one of the patterns takes, see `split`. Raises UserError, which names the `field` they are of."""
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            matches = {path for path in paths if re.match(f"(?:{pattern})(?:/|$)", path)}
        except re.error as error:
            raise UserError(f'{field}: "{pattern}" is not a regular expression ({error})') from None
        if not matches:
            tops = {path.split("/")[0] for path in paths}
            raise UserError(f'{field}: "{pattern}" matches no parameter{nearest(pattern, tops)}')
        chosen |= matches
    return chosen


def split(params: dict[str, Any], patterns: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen): two nested dicts that share no leaf and together hold every leaf.

    A path such as `decoder/layers/attention/query/kernel` is trainable when one of the patterns matches
    whole components from its beginning: `"decoder"` takes the whole decoder, `"vision|audio"` both encoders
    but not `audio_projector`, `".*_projector"` all projectors.

    Raises:
        UserError: a pattern is no regex, or matches no parameter.
    """
    flat = flatten_dict(params, sep="/")
    chosen = matching(flat, patterns, "trainable")
    if not chosen:
        raise UserError('trainable is empty: name the parameters to train, such as "decoder"')
    trainable = unflatten_dict({p: x for p, x in flat.items() if p in chosen}, sep="/")
    frozen = unflatten_dict({p: x for p, x in flat.items() if p not in chosen}, sep="/")
    return trainable, frozen


def join(trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The nested dict that `split` took apart."""
    flat = {**flatten_dict(frozen, sep="/"), **flatten_dict(trainable, sep="/")}
    return unflatten_dict(dict(sorted(flat.items())), sep="/")
