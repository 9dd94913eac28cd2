"""Cases of systems that transformers has no class for: arrays that the authors' own code computed.

The checkpoints are tiny and random, in the released names; tests/parity/fixtures/*/*/meta.json says what each array is.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np

import mm_jax
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

    def same_pixels(self, found: np.ndarray, name: str) -> None:
        """The reference divides by 255 where we multiply."""
        error = float(np.abs(found - self[name]).max())
        assert found.shape == self[name].shape and error <= 1e-6, error
        note(self.lm.family, "preprocessing", error)
