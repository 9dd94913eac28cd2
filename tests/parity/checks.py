"""What every family must do, as functions of the reference's model and ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

import mm_jax
from mm_jax.checkpoint.hf import save_hf
from tests.parity import theirs
from tests.parity.record import note

TOLERANCE = 1e-4


# Linear attention normalises its sums (Qwen3.5): where they are small, the noise of float32 grows with everything else.
# Ours lay 4.6e-5 and theirs 1.9e-5 from a float64 reference on a batch where usual decoders are 50 times nearer.
LINEAR_TOLERANCE = 3e-4


def tolerance_of(lm) -> float:
    decoder = getattr(lm.config, "decoder", lm.config)
    return LINEAR_TOLERANCE if getattr(decoder, "delta_layers", None) else TOLERANCE


@functools.lru_cache(maxsize=1)
def compiled(lm):
    """`lm.apply` with its programs, which the batches of one test share."""
    return jax.jit(lm.apply)


def same_logits(model, lm, arrays: dict[str, np.ndarray], tolerance: float | None = None) -> float:
    """The largest difference over the real tokens; the logits have about unit scale."""
    batch = lm.batch(**arrays)
    ours = np.asarray(compiled(lm)(lm.params, batch))
    expected = theirs.logits(model, arrays)
    real = arrays["attention_mask"].astype(bool)
    assert ours.shape == expected.shape
    assert 0.1 < expected[real].std() < 10
    error = float(np.abs(ours - expected)[real].max())
    assert error <= (tolerance or tolerance_of(lm)), error
    if all(x.dtype == jnp.float32 for x in jax.tree.leaves(lm.params)):
        note(lm.family, "logits", error)
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
    note(lm.family, "greedy", True)


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
    note(lm.family, "round trip", True)


def same_features(tower, ours: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Of an encoder alone; they have about unit scale."""
    assert ours.shape == expected.shape and 0.1 < expected.std() < 10
    error = float(np.abs(ours - expected).max())
    assert error <= tolerance, error
    note(tower.family, "logits", error)


def came_back(tower, model, directory: Path) -> None:
    """What we save of an encoder is what transformers loads, tensor by tensor."""
    mm_jax.save(tower, directory)
    loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for key, value in model.state_dict().items():
        assert value.equal(loaded.state_dict()[key]), key
    note(tower.family, "round trip", True)


def same_gradients(
    model,
    lm,
    arrays: dict[str, np.ndarray],
    directory: Path,
    tolerance: float | None = None,
    released: Callable[[Path, Path], None] | None = None,
) -> float:
    """The gradient of the mean cross-entropy of every next token of text with respect to every parameter.

    Our gradients are saved as if they were a checkpoint, and transformers reads them under its own names.

    Args:
      released: for a model that was loaded from files in other names than transformers': from a directory of
        transformers to one in those names. The reference's gradients are then saved and renamed as a checkpoint.

    Returns:
      The largest difference over the largest entry of the same tensor's gradient, or over a thousandth of the largest
      entry of all where a tensor has next to none (biases of keys, which the softmax cancels).
    """
    tolerance = tolerance or tolerance_of(lm)
    ids, mask = arrays["input_ids"], arrays["attention_mask"].astype(bool)
    media = np.isin(ids, list(lm.checkpoint.rule.tokens.values()))
    wanted = (mask[:, 1:] & mask[:, :-1] & ~media[:, 1:]).astype(np.float32)
    weights = wanted / wanted.sum()
    ids = np.where(media, 0, ids)  # which need be no words
    model.zero_grad()
    logits = model(**{k: torch.from_numpy(v) for k, v in arrays.items()}).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(ids[:, 1:]).long().flatten(), reduction="none"
    )
    expected = (losses * torch.from_numpy(weights).flatten()).sum()
    expected.backward()

    def loss(params):
        logp = jax.nn.log_softmax(lm.apply(params, lm_batch)[:, :-1])
        return -jnp.sum(jnp.take_along_axis(logp, jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0] * weights)

    lm_batch = lm.batch(**arrays)
    found, gradients = jax.jit(jax.value_and_grad(loss))(lm.params)
    assert abs(float(found) - float(expected.detach())) <= tolerance
    save_hf(directory / "ours", lm.checkpoint, gradients)
    if released is None:
        ours = type(model).from_pretrained(directory / "ours").state_dict()
        theirs_ = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    else:
        copy = deepcopy(model)
        for mine, yours in zip(copy.parameters(), model.parameters(), strict=True):
            mine.data = torch.zeros_like(yours) if yours.grad is None else yours.grad
        copy.save_pretrained(directory / "theirs")
        released(directory / "theirs", directory / "released")
        ours, theirs_ = (load_file(directory / d / "model.safetensors") for d in ("ours", "released"))
        theirs_ = {name: gradient for name, gradient in theirs_.items() if name not in lm.checkpoint.unused}
    assert len(theirs_) > 0.5 * len(lm.checkpoint.system.weights)
    largest = max(float(g.abs().max()) for g in theirs_.values())
    errors = {
        name: float((ours[name] - g).abs().max()) / max(float(g.abs().max()), 1e-3 * largest)
        for name, g in theirs_.items()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, (worst, errors[worst])
    note(lm.family, "gradient", errors[worst])
    return errors[worst]
