"""Tiny checkpoints of transformers' classes with every parameter at a visible scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

TEXT = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=None,
)

VISION = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=3, num_attention_heads=3)

torch.set_num_threads(1)


def build(config, directory: Path, kind: str = "AutoModelForCausalLM", dtype: str = "float32", **save):
    """A model of the class with random weights, saved; none is at its first value, so none can be left out.

    Matrices are scaled so that logits have about unit scale.
    """
    model = getattr(transformers, kind)
    model = model.from_config(config) if kind.startswith("Auto") else model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1 and "norm" in name and name.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            elif value.ndim == 1:
                value.copy_(0.2 * noise)
            else:
                value.copy_(0.15 * noise)
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(directory, **save)
    # a model turned into half precision has rounded its rotary table too, one that is loaded has not
    return model if dtype == "float32" else type(model).from_pretrained(directory)


def rename(directory: Path, change) -> None:
    """Rewrites the names of a saved checkpoint's tensors."""
    tensors = load_file(directory / "model.safetensors")
    tensors = {change(name): np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def rows(vocab: int, lengths=(9, 14), pad_left: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Random prompts of different lengths."""
    random = np.random.default_rng(seed)
    size = max(lengths)
    ids = np.full((len(lengths), size), 0)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        part = slice(size - length, size) if pad_left else slice(0, length)
        ids[row, part] = random.integers(3, vocab, length)
        mask[row, part] = 1
    return {"input_ids": ids, "attention_mask": mask}


def logits(model, arrays: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return model(**{k: torch.from_numpy(v) for k, v in arrays.items()}).logits.float().numpy()


def generate(model, arrays: dict[str, np.ndarray], new: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Greedy new ids [B, new], and the distance of the two best logits at each step."""
    inputs = {k: torch.from_numpy(v) for k, v in arrays.items()}
    out = model.generate(
        **inputs, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True,
        pad_token_id=0,
    )  # fmt: skip
    scores = torch.stack(out.logits, 1).float()
    best = scores.topk(2, dim=-1).values
    return out.sequences[:, -new:].numpy(), (best[..., 0] - best[..., 1]).numpy()
