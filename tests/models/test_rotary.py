"""Rotary positions against a complex rotation in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mm_jax.models.rotary import RopeScaling, rotate, rotation


def turn(x, positions, theta):
    return rotate(x, rotation(positions, x.shape[-1], theta))


def test_by_literal_example():
    """Width 4 and theta 100: frequencies 1 and 0.1; channels 0 and 2 are one pair, 1 and 3 the other."""
    x = jnp.asarray([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)
    turned = turn(x, jnp.asarray([[3]]), 100.0)[0, 0, 0]
    expected = [np.cos(3), -2 * np.sin(0.3), np.sin(3), 2 * np.cos(0.3)]
    np.testing.assert_allclose(turned, expected, atol=1e-6)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_equals_the_complex_rotation(theta):
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 5, 3, 16)).astype(np.float32)
    positions = random.integers(0, 60, (2, 5))
    expected = reference.rotary(x, positions, theta)
    np.testing.assert_allclose(turn(jnp.asarray(x), jnp.asarray(positions), theta), expected, atol=1e-5)


def test_products_depend_on_distances_alone():
    random = np.random.default_rng(1)
    query, key = (jnp.asarray(random.normal(size=(1, 1, 1, 32)), jnp.float32) for _ in range(2))

    def product(m: int, n: int) -> float:
        turned = (turn(x, jnp.asarray([[p]]), 10_000.0) for x, p in ((query, m), (key, n)))
        return float(jnp.vdot(*turned))

    assert product(0, 0) == pytest.approx(float(jnp.vdot(query, key)), abs=1e-4)
    for distance in (1, 5, 40):
        # angles of some hundred radians are rounded to 1e-5 in float32
        assert product(distance, 0) == pytest.approx(product(200 + distance, 200), abs=1e-3)
    assert abs(product(5, 0) - product(0, 5)) > 0.1


def test_low_precision_is_turned_in_float32():
    """At position 3000 a bfloat16 angle would be wrong by whole radians; only the result is rounded."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 1, 2, 16)), jnp.bfloat16)
    turned = turn(x, jnp.asarray([[3001]]), 10_000.0)
    assert turned.dtype == jnp.bfloat16
    expected = reference.rotary(x, [[3001]], 10_000.0)
    np.testing.assert_allclose(turned.astype(jnp.float32), expected, atol=0.02)


def frequencies(scaling: RopeScaling, last: int = 1) -> np.ndarray:
    """Those of heads of width 8 and theta 10_000 (unscaled 1, 0.1, 0.01, 0.001), in texts of last + 1 tokens."""
    sin, cos = rotation(jnp.asarray([[1, last]]), 8, 10_000.0, scaling)
    return np.arctan2(sin, cos)[0, 0, 0] / scaling.magnitude


def test_scalings_by_literal_example():
    plain = np.array([1, 0.1, 0.01, 0.001])
    np.testing.assert_allclose(frequencies(RopeScaling("linear", 4.0)), plain / 4, rtol=1e-5)
    # up to the trained length nothing; at twice the length the base grows by (2 * 2 - 1) ** (8 / 6)
    dynamic = RopeScaling("dynamic", 2.0, original_length=10)
    np.testing.assert_allclose(frequencies(dynamic, last=9), plain, rtol=1e-5)
    grown = (10_000 * 3 ** (8 / 6)) ** -np.array([0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(frequencies(dynamic, last=19), grown, rtol=1e-5)
    # 628 tokens: 99.9, 9.99, 0.999 and 0.0999 turns; kept from 4 turns on, divided up to 1
    llama3 = RopeScaling("llama3", 8.0, original_length=628)
    np.testing.assert_allclose(frequencies(llama3), [1, 0.1, 0.00125, 0.000125], rtol=1e-3)
    # 32 turns at channel 0.49, one at 1.9995: whole channels 0 to 2, so half of channel 1 is kept
    yarn = RopeScaling("yarn", 4.0, original_length=628)
    np.testing.assert_allclose(frequencies(yarn), [1, 0.1 * 0.625, 0.0025, 0.00025], rtol=1e-3)


def test_magnitude_is_on_sines_and_cosines():
    sin, cos = rotation(jnp.asarray([[3]]), 8, 10_000.0, RopeScaling("yarn", 4.0, 628, magnitude=1.5))
    np.testing.assert_allclose(np.hypot(sin, cos), 1.5, rtol=1e-5)
