"""Tiny checkpoints of transformers' classes with every parameter at a visible scale."""

from __future__ import annotations

import math
import re
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


def build(
    config,
    directory: Path,
    kind: str = "AutoModelForCausalLM",
    dtype: str = "float32",
    scales: dict[str, float] | None = None,
    **save,
):
    """A model of the class with random weights, saved; none is at its first value, so none can be left out.

    Matrices are scaled so that logits have about unit scale. `scales` are further factors on those whose names hold a
    string: without them some parts would hardly be seen in the logits.
    """
    model = getattr(transformers, kind)
    model = model.from_config(config) if kind.startswith("Auto") else model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1 and re.search(r"norm|\bln_", name) and name.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            elif value.numel() == 1 and "gate" in name:  # its tanh is a factor on a whole branch
                value.copy_(0.7 + 0.2 * noise)
            elif name.endswith("A_log"):  # of memories that fade: some reach far
                value.copy_(-2 + noise)
            elif value.ndim == 1:
                value.copy_(0.2 * noise)
            else:
                more = [factor for part, factor in (scales or {}).items() if part in name]
                value.copy_(0.15 * math.prod(more) * noise)
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
            elif name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
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


def pictured(
    places, token: int, each: int, size: tuple[int, int], *, pad_left: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows of different lengths with pictures in them.

    Args:
      places: for each row (text token that it stands before, tiles) of each picture.
      token: the image token; text tokens are smaller.
      each: tokens of a tile.
      size: (height, width) of a tile.
    """
    random = np.random.default_rng(seed)
    texts, tiles = [], 0
    for row, pieces in enumerate(places):
        ids = random.integers(3, token, 6 + 3 * row).tolist()
        for place, count in sorted(pieces, reverse=True):
            ids[place:place] = [token] * (count * each)
            tiles += count
        texts.append(ids)
    longest = max(map(len, texts))
    arrays = {"input_ids": np.zeros((len(texts), longest), int)}
    arrays["attention_mask"] = np.zeros_like(arrays["input_ids"])
    for row, ids in enumerate(texts):
        part = slice(longest - len(ids), longest) if pad_left else slice(0, len(ids))
        arrays["input_ids"][row, part] = ids
        arrays["attention_mask"][row, part] = 1
    if tiles:
        arrays["pixel_values"] = random.normal(size=(tiles, 3, *size)).astype(np.float32)
    return arrays


def as_internlm2(config: dict, tensors: dict[str, np.ndarray], prefix: str = "") -> dict:
    """Renames a Llama's tensors in place to those of an InternLM2 with the same numbers, and gives its config."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    names = {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name in [n for n in tensors if n.startswith(prefix)]:
        if "q_proj" in name:
            parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            # [groups, rows of a group, ...] side by side, so that each key/value head follows its queries
            parts = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
            fused = np.concatenate(parts, axis=1)
            name = name.replace("self_attn.q_proj", "attention.wqkv")
            tensors[name] = fused.reshape(-1, *fused.shape[2:])
        elif "k_proj" not in name and "v_proj" not in name:
            value = tensors.pop(name)
            for one, two in names.items():
                name = name.replace(one, two)
            tensors[name] = value
    assert heads % groups == 0
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "eos_token_id", "pad_token_id",
            "hidden_act")  # fmt: skip
    rope = config["rope_parameters"]
    return {k: config[k] for k in kept} | {
        "model_type": "internlm2",
        "bias": config["attention_bias"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else {"type": rope["rope_type"], **rope},
    }


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
