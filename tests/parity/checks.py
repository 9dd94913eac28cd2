"""What every family must do, as functions of the reference's model and ours."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import transformers

import mm_jax
from tests.parity import theirs

TOLERANCE = 1e-4


@functools.cache
def compiled(lm):
    """`lm.apply` with its programs, which the batches of one test share."""
    return jax.jit(lm.apply)


def same_logits(model, lm, arrays: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> float:
    """The largest difference over the real tokens; the logits have about unit scale."""
    batch = lm.batch(**arrays)
    ours = np.asarray(compiled(lm)(lm.params, batch))
    expected = theirs.logits(model, arrays)
    real = arrays["attention_mask"].astype(bool)
    assert ours.shape == expected.shape
    assert 0.1 < expected[real].std() < 10
    error = float(np.abs(ours - expected)[real].max())
    assert error <= tolerance, error
    return error


def same_greedy(model, lm, arrays: dict[str, np.ndarray], new: int = 16) -> None:
    """Greedy ids, up to a difference at a step whose two best logits are too close to call."""
    expected, margins = theirs.generate(model, arrays, new)
    ours = lm.generate(lm.batch(**arrays), new, ignore_eos=True)
    compared = 0
    for mine, yours, margin in zip(ours, expected, margins, strict=True):
        differ = np.flatnonzero(mine != yours)
        same = differ[0] if len(differ) else new
        assert same == new or margin[same] < 0.02, (mine, yours, margin)
        compared += same
    assert compared > new, "the reference's choices are too close to compare"


def same_after_saving(model, lm, arrays: dict[str, np.ndarray], directory: Path, kind: str) -> None:
    """Saved by us, loaded by transformers: nothing missing, nothing unexpected, the same weights and logits."""
    mm_jax.save(lm, directory, format="hf")
    loaded, info = getattr(transformers, kind).from_pretrained(directory, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and value.equal(after[name]), name
    assert np.array_equal(theirs.logits(loaded.eval(), arrays), theirs.logits(model, arrays))
