"""Host memory while a Hugging Face checkpoint is read."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from mm_jax.checkpoint.hf import abstract_params
from mm_jax.checkpoint.safetensors import Entry, write
from mm_jax.families import FAMILIES

VALUES = {
    "model_type": "llama", "vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 8, "num_attention_heads": 16,
}  # fmt: skip

LOAD = """
import sys, jax
from mm_jax.checkpoint.hf import load_hf
from mm_jax.resident import peak_resident as peak

jax.numpy.zeros(3).block_until_ready()
before = peak()
_, params = load_hf(sys.argv[1])
size = sum(x.nbytes for x in jax.tree.leaves(jax.block_until_ready(params)))
print(size, peak() - before - size)
"""


@pytest.mark.slow
def test_peak_stays_near_the_largest_tensor(tmp_path):
    """517 MB of parameters, the largest tensor 62 MB; what XLA needs to compile the copies is in the bound too."""
    system = FAMILIES["llama"].system(VALUES, frozenset({"lm_head.weight"}))
    shapes = abstract_params(system.config)
    entries = []
    for weight in system.weights:
        shape = shapes[weight.path]
        theirs = weight.their_shape(shape)
        for name in weight.names(shape):
            read = lambda theirs=theirs: np.ones(theirs, np.float32)  # noqa: E731
            entries.append(Entry(name, np.dtype(np.float32), theirs, read))
    write(tmp_path / "model.safetensors", entries)
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path], check=True, capture_output=True, text=True)
    size, above = map(int, done.stdout.split())
    assert size == sum(4 * math.prod(shape) for shape in shapes.values())
    largest = max(entry.size for entry in entries)
    assert above < 3 * largest, f"{above / 2**20:.0f} MB above the parameters"
