"""What the backward pass keeps, and which kernel attends: never what is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mm_jax.models import Attention, Decoder, DecoderConfig, Execution, Mask, attention, row_mask
from mm_jax.models.attention import choose_kernel, narrowed

CONFIG = DecoderConfig(
    64, embed_dim=32, num_layers=9, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=48, tie_embeddings=False
)
TOKENS = np.arange(16, dtype=np.int32).reshape(2, 8)


def gradients(execution: Execution):
    """(a function of params, params) of a decoder deep enough to be a loop on the CPU as well."""
    decoder = Decoder(CONFIG, execution=execution)
    mask = row_mask(jnp.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8]))
    places = jnp.broadcast_to(jnp.arange(8), (2, 8))

    def total(params, *, init: bool = False):
        def run(module):
            return module.logits(module.hidden(module.embed(TOKENS), mask, places)[0])

        if init:
            return decoder.init(params, method=run)
        return jax.nn.logsumexp(decoder.apply(params, method=run)).sum()

    return total


def params():
    variables = gradients(Execution())(jax.random.key(0), init=True)
    # branches of a new model are closed, see mm_jax.models.layers
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), variables)


def saved(execution: Execution, variables) -> int:
    """Values that go from the forward to the backward pass of the loop over layers."""
    program = jax.make_jaxpr(jax.grad(gradients(execution)))(variables)
    loops = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(loops) == 2
    count = loops[0].params["num_carry"]
    return sum(v.aval.size for v in loops[0].outvars[count:])


@pytest.fixture(scope="module")
def expected():
    variables = params()
    return variables, jax.jit(jax.grad(gradients(Execution())))(variables)


@pytest.mark.parametrize("remat", ["dots", "minimal", "full"])
def test_recomputed_gradients_are_the_same(remat, expected):
    variables, gradient = expected
    found = jax.jit(jax.grad(gradients(Execution(remat=remat))))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, gradient)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) > 1e-2


def test_policies_keep_less_and_less(expected):
    kept = [saved(Execution(remat=name), expected[0]) for name in ("none", "dots", "minimal", "full")]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4, kept
    assert kept[-1] == 9 * 2 * 8 * 32  # the inputs of the layers


def test_offloaded_inputs_go_to_the_host(expected):
    program = str(jax.make_jaxpr(jax.grad(gradients(Execution(remat="offload"))))(expected[0]))
    assert "pinned_host" in program.lower() or "<host>" in program.lower()
    assert "pinned_host" not in str(jax.make_jaxpr(jax.grad(gradients(Execution(remat="full"))))(expected[0]))


LENGTH = 256
SEGMENTS = jnp.array([[1] * 100 + [2] * 120 + [0] * 36, [1] * 256])


def arrays(heads: int = 2, kv_heads: int = 1, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = [(heads, 2.0), (kv_heads, 2.0), (kv_heads, 1.0)]
    return [
        (scale * jax.random.normal(k, (2, LENGTH, n, 32))).astype(dtype)
        for k, (n, scale) in zip(keys, sizes, strict=True)
    ]


CASES = {
    "segments": (row_mask(SEGMENTS), None, 0.0),
    "both ways": (row_mask(SEGMENTS, causal=False), None, 0.0),
    "window and cap": (narrowed(row_mask(SEGMENTS), jnp.int32(40), (40, 40), None), 0.3, 5.0),
    "one window of two": (narrowed(row_mask(SEGMENTS), jnp.int32(40), (0, 40), None), None, 0.0),
    "no mask": (None, None, 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_splash_attention_equals_the_plain_one(name):
    """The kernel of TPUs, interpreted: outputs and gradients of real tokens, two query heads on one key head."""
    mask, scale, cap = CASES[name]
    real = (SEGMENTS > 0)[:, :, None, None]

    def total(kernel, *inputs):
        out = attention(*inputs, mask, scale, cap, execution=Execution(attention=kernel))
        return (jnp.sin(3 * out) * real).sum(), jnp.where(real, out, 0)

    (_, plain), expected = jax.value_and_grad(total, (1, 2, 3), has_aux=True)("xla", *arrays())
    (_, found), grads = jax.value_and_grad(total, (1, 2, 3), has_aux=True)("splash", *arrays())
    # the kernel sums in blocks: 3.5e-6 apart on values of up to 3
    np.testing.assert_allclose(found, plain, atol=1e-5)
    for ours, theirs in zip(grads, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


class FakeMesh:
    """All that `Execution.platform` asks of a mesh."""

    def __init__(self, platform: str):
        self.devices = np.array([type("Device", (), {"platform": platform})()])


def test_the_kernel_is_chosen_by_device_and_arrays():
    def chosen(platform, length=512, mask="rows", cap=0.0, dtype=jnp.bfloat16, dim=128):
        query = jnp.zeros((1, length, 2, dim), dtype)
        segments = jnp.ones((1, length), jnp.int32)
        masks = {"rows": row_mask(segments), "cache": Mask(segments, segments, segments), "none": None}
        masks["table"] = jnp.ones((1, 1, length, length), bool)
        return choose_kernel(query, query, masks[mask], cap, None, Execution(mesh=FakeMesh(platform)))

    assert chosen("tpu") == chosen("tpu", cap=3.0) == chosen("tpu", mask="none") == "splash"
    assert {chosen("tpu", mask=m) for m in ("cache", "table")} == {"xla"}
    assert chosen("tpu", length=500) == chosen("tpu", length=256) == "xla"
    assert chosen("gpu") == chosen("gpu", mask="table") == "cudnn"
    assert {
        chosen("gpu", cap=3.0),
        chosen("gpu", dtype=jnp.float32),
        chosen("gpu", dim=256),
        chosen("cpu"),
    } == {"xla"}
    with pytest.raises(ValueError, match="splash attention cannot be used for queries float32"):
        Attention(2, 2, 8, execution=Execution(attention="splash")).init(
            jax.random.key(0), jnp.zeros((1, 5, 16))
        )
