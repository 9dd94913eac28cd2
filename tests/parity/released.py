"""Cases of systems that transformers has no class for: arrays that the authors' own code computed.

The checkpoints are tiny and random, in the released names; tests/parity/fixtures/*/*/meta.json says what each array is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import mm_jax
from mm_jax.models import MultimodalLM
from mm_jax.models.attention import attention_weights
from tests.parity.record import note

FIXTURES = Path(__file__).parent / "fixtures"


class Case:
    """One folder of the fixtures; weights are widened to float32, as the arrays were computed."""

    def __init__(self, name: str):
        self.directory = FIXTURES / name
        self.arrays = dict(np.load(self.directory / "case.npz"))
        self.meta = json.loads((self.directory / "meta.json").read_text())
        self.lm = mm_jax.load(self.directory, dtype="float32")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def batch(self) -> dict[str, np.ndarray]:
        """Of the case's inputs under their own names."""
        inputs = {
            name.removeprefix("in/"): array for name, array in self.arrays.items() if name.startswith("in/")
        }
        return self.lm.batch(**inputs)

    def images(self) -> list[np.ndarray]:
        """The pictures, uint8 [H, W, 3]."""
        return [
            self[f"in/image_{k}"]
            for k in range(sum(name.startswith("in/image_") and name[9:].isdigit() for name in self.arrays))
        ]

    def check(self, batch: dict[str, np.ndarray]) -> float:
        """Logits at real tokens within the case's tolerance; the largest difference."""
        ours = np.asarray(jax.jit(self.lm.apply)(self.lm.params, batch))
        real = self["out/valid"]
        error = float(np.abs(ours - self["out/logits"])[real].max())
        assert error <= self.meta["tolerance_atol"]["logits"], error
        note(self.lm.family, "logits", error)
        return error

    def check_features(self, batch: dict[str, np.ndarray]) -> None:
        """What the decoder gets at the places of the pictures."""
        model = self.lm.model
        embed = jax.jit(lambda p, b: model.apply({"params": p}, b, method="_embed")[0])
        embedded = np.asarray(embed(self.lm.params, batch))
        bounds = zip(self["in/image_row"], self["in/image_bound"], strict=True)
        features = np.concatenate([embedded[row, start:stop] for row, (start, stop) in bounds])
        expected = self["out/image_features"]
        error = np.abs(features - expected.reshape(features.shape)).max()
        assert error <= self.meta["tolerance_atol"]["image_features"], error

    def check_greedy(self, batch: dict[str, np.ndarray]) -> None:
        expected = self["out/greedy"]
        assert np.array_equal(self.lm.generate(batch, expected.shape[1], ignore_eos=True), expected)
        note(self.lm.family, "greedy", True)

    def check_saving(self, directory: Path) -> None:
        """Loaded as it is and saved, the file comes back bit for bit."""
        from safetensors.flax import load_file

        mm_jax.save(mm_jax.load(self.directory), directory)
        before, after = (load_file(d / "model.safetensors") for d in (self.directory, directory))
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert value.dtype == after[name].dtype and (value == after[name]).all(), name
        note(self.lm.family, "round trip", True)

    def check_gradients(
        self, batch: dict[str, np.ndarray], fixed: tuple[str, ...] = (), tries: int = 3
    ) -> None:
        """Of the mean cross-entropy of every next token of text with respect to every parameter: the arrays hold none,
        so along random directions of each parameter they are compared with central differences of the forward, whose
        values `check` has compared, in float64.

        Differences are relative to the length of the parameter's gradient, or to a thousandth of the longest one where
        that is next to nothing (biases of keys, which the softmax cancels).

        Args:
          fixed: parameters that training leaves as they are.
          tries: directions of each parameter.
        """
        tokens, real = batch["tokens"], batch["segment_ids"] > 0
        wanted = real[:, 1:] & real[:, :-1] & (batch["media_index"][:, 1:] == -1)
        config = self.lm.config

        def loss(flat: dict[str, jax.Array], dtype: str) -> jax.Array:
            model = MultimodalLM(dataclasses.replace(config, dtype=dtype))
            logits = model.apply({"params": unflatten_dict(flat, sep="/")}, batch)
            assert logits.dtype == dtype
            logp = jax.nn.log_softmax(logits[:, :-1])
            found = jnp.take_along_axis(logp, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
            return -jnp.sum(found * wanted) / wanted.sum()

        flat = flatten_dict(self.lm.params, sep="/")
        gradients = jax.jit(jax.grad(lambda x: loss(x, "float32")))(flat)
        gradients = {path: np.asarray(x, np.float64) for path, x in gradients.items()}
        lengths = {path: np.linalg.norm(x) for path, x in gradients.items()}
        least = 1e-3 * max(lengths.values())
        assert sum(x > least for x in lengths.values()) > 0.7 * len(lengths)
        random, errors = np.random.default_rng(0), {}
        with wide():
            values = {path: np.asarray(x, np.float64) for path, x in flat.items()}
            forward = jax.jit(lambda x: loss(x, "float64"))
            for path, value in values.items():
                if path in fixed:
                    assert not gradients[path].any()
                    continue
                for _ in range(tries):
                    way = random.normal(size=value.shape)
                    step = 1e-4 * max(float(np.sqrt(np.mean(value**2))), 1e-2)
                    up, down = (float(forward(values | {path: value + s * way})) for s in (step, -step))
                    error = abs((up - down) / (2 * step) - np.sum(gradients[path] * way))
                    errors[path] = max(errors.get(path, 0.0), error / max(lengths[path], least))
        worst = max(errors, key=errors.get)
        assert errors[worst] <= 1e-4, (worst, errors[worst])
        note(self.lm.family, "differences", errors[worst])

    def same_pixels(self, found: np.ndarray, name: str) -> None:
        """The reference divides by 255 where we multiply."""
        error = float(np.abs(found - self[name]).max())
        assert found.shape == self[name].shape and error <= 1e-6, error
        note(self.lm.family, "preprocessing", error)


@contextlib.contextmanager
def wide() -> Iterator[None]:
    """What is traced in here computes in float64 where it would in float32."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "float32", jnp.float64)
        patch.setattr(jax.nn, "dot_product_attention", _attend)
        yield


def _attend(query, key, value, bias, mask, scale, implementation) -> jax.Array:
    """jax's own has a softmax in float32, whatever its arguments."""
    assert bias is None
    weights = attention_weights(query, key, mask, scale)
    value = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)
