"""The formulas of the papers in plain numpy, float64, with loops where loops are clearest; random parameters."""

from typing import Any

import jax
import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attention(query, key, value, mask=None) -> tuple[np.ndarray, np.ndarray]:
    """[B, T, N, H], [B, S, K, H], [B, S, K, H], bool [B, 1, T, S] -> [B, T, N, H] and weights [B, N, T, S]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    rows, length, heads, width = query.shape
    shared = heads // key.shape[2]
    out, weights = np.zeros_like(query), np.zeros((rows, heads, length, key.shape[1]))
    for b in range(rows):
        for n in range(heads):
            logits = query[b, :, n] @ key[b, :, n // shared].T / np.sqrt(width)
            if mask is not None:
                logits = np.where(np.broadcast_to(mask, (rows, *mask.shape[1:]))[b, 0], logits, -np.inf)
            weights[b, n] = softmax(logits)
            out[b, :, n] = weights[b, n] @ value[b, :, n // shared]
    return out, weights


def rotary(x, positions, theta) -> np.ndarray:
    """Channel i and channel i + H/2 of a head are one complex number, turned by position * theta^(-2i/H)."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    turned = x[..., :half] + 1j * x[..., half:]
    turned *= np.exp(1j * np.asarray(positions)[..., None, None] * theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag], -1)


def rms_norm(x, scale, eps=1e-6) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def layer_norm(x, scale=1.0, bias=0.0, eps=1e-6) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def gelu_tanh(x) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x) -> np.ndarray:
    return x / (1 + np.exp(-x))


def dense(params, x) -> np.ndarray:
    return x @ params["kernel"] + params.get("bias", 0.0)


def heads(x, count) -> np.ndarray:
    """[..., N * H] -> [..., N, H]: head n has the channels n * H ... (n + 1) * H - 1."""
    return x.reshape(*x.shape[:-1], count, -1)


def draw(module: Any, *inputs: Any, method: Any = None, seed: int = 0) -> dict:
    """Parameters of a module, none of them zero or one: a forgotten bias or scale shows. Compiles nothing."""
    random = np.random.default_rng(seed)

    def fill(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name, x = path[-1].key, random.normal(size=shape.shape)
        if name == "scale":
            x = 1 + 0.3 * x
        elif name == "kernel":
            x = 1.5 * x / np.sqrt(np.prod(shape.shape[-3:-1] if "conv" in path[-2].key else shape.shape[-2]))
        else:
            x = 0.3 * x
        return x.astype(shape.dtype)

    shapes = jax.eval_shape(lambda key: module.init(key, *inputs, method=method), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes["params"])
