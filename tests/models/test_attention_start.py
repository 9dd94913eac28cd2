"""The mimetic start of attention: what is alike is looked at and passed on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.models import Decoder, DecoderConfig
from mm_jax.models.layers import Attention, mimetic_kernels


def attention(start: str) -> Attention:
    return Attention(4, 2, 16, use_bias=False, start=start)


def test_mimetic_kernels_look_at_what_is_alike_and_pass_it_on():
    kernels = mimetic_kernels(jax.random.key(0), 64, 4, 2, 16)
    assert {name: kernel.shape for name, kernel in kernels.items()} == {
        "query": (64, 64), "key": (64, 32), "value": (64, 32), "out": (64, 64),
    }  # fmt: skip
    query, key, value, out = (np.asarray(kernels[name]) for name in ("query", "key", "value", "out"))
    for head in range(4):
        own, shared = slice(16 * head, 16 * head + 16), slice(16 * (head // 2), 16 * (head // 2) + 16)
        np.testing.assert_array_equal(query[:, own], key[:, shared])
        np.testing.assert_array_equal(out[own], value[:, shared].T)
    assert not np.allclose(key, value)


@pytest.mark.parametrize("start", ["closed", "mimetic"])
def test_start_of_a_new_model(start):
    x = jax.random.normal(jax.random.key(1), (2, 12, 64))
    x = x.at[:, 7].set(x[:, 2])  # the eighth token is like the third
    module = attention(start)
    params = module.init(jax.random.key(0), x)["params"]
    (out, _), seen = module.apply({"params": params}, x, mutable="intermediates")
    weights = seen["intermediates"]["attention_weights"][0][:, :, 7]  # [B, N, S] of the eighth token
    assert params["out"]["kernel"].shape == (64, 64)
    if start == "closed":
        assert not out.any()
    else:
        alike = jnp.minimum(weights[..., 2], weights[..., 7])
        others = jnp.delete(weights, jnp.array([2, 7]), axis=-1).max(-1)
        assert (alike > others).all()
        # what is passed on points the same way as what was looked at
        cosine = (out * x).sum(-1) / jnp.linalg.norm(out, axis=-1) / jnp.linalg.norm(x, axis=-1)
        assert cosine.mean() > 0.5


def test_layers_start_differently():
    config = DecoderConfig(
        vocab_size=32, embed_dim=32, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=32,
        attention_start="mimetic",
    )  # fmt: skip
    one = jnp.ones((1, 4), jnp.int32)

    def run(module: Decoder) -> jax.Array:
        return module.logits(module.hidden(module.embed(one), jnp.ones((1, 1, 4, 4), bool), one)[0])

    params = Decoder(config).init(jax.random.key(0), method=run)["params"]
    kernels = params["layers"]["attention"]
    assert kernels["query"]["kernel"].shape == (3, 32, 32)
    assert not np.allclose(kernels["key"]["kernel"][0], kernels["key"]["kernel"][1])
    np.testing.assert_array_equal(kernels["query"]["kernel"][..., :16], kernels["key"]["kernel"])
