"""Functions that would overflow or cancel, against float64, and past their ends against their tangents."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.stable import EXPONENT_LIMIT, LOG1MEXP_LIMIT, box_cox, log1mexp

POINTS = np.float32([-40.0, -8.0, -1.0, -1e-3, -1e-7, 0.0, 1e-7, 1e-3, 1.0, 8.0])


@pytest.mark.parametrize("power", [-2.0, -1.0, -0.25, -1e-6, 0.0, 1e-6, 0.5, 1.0])
def test_box_cox(power):
    x = POINTS[np.abs(power * POINTS) < EXPONENT_LIMIT]
    exact = np.float64(x)
    want = exact if power == 0 else np.expm1(power * exact) / power
    np.testing.assert_allclose(box_cox(x, power), want, rtol=1e-5, atol=1e-12)
    slope = jax.grad(lambda x: box_cox(x, power).sum())(x)
    np.testing.assert_allclose(slope, np.exp(power * exact), rtol=1e-5)


@pytest.mark.parametrize("power", [-3.0, -1.0, 0.5, 2.0])
def test_box_cox_past_its_end_is_the_tangent(power):
    end = EXPONENT_LIMIT / power
    x = np.float32([1.5 * end, 1e4 * np.sign(power)])
    want = (
        np.expm1(EXPONENT_LIMIT) + np.exp(EXPONENT_LIMIT) * (power * np.float64(x) - EXPONENT_LIMIT)
    ) / power
    np.testing.assert_allclose(box_cox(x, power), want, rtol=1e-5)
    slope = jax.grad(lambda x: box_cox(x, power).sum())(x)
    np.testing.assert_allclose(slope, np.exp(EXPONENT_LIMIT), rtol=1e-5)
    chex.assert_tree_all_finite(jnp.square(2 * box_cox(x, power)))


def test_box_cox_under_a_traced_power():
    f = jax.jit(jax.vmap(lambda power: jax.grad(lambda x: box_cox(x, power))(0.5)))
    np.testing.assert_allclose(f(jnp.array([0.0, 1.0, -2.0])), np.exp([0.0, 0.5, -1.0]), rtol=1e-6)


def test_log1mexp():
    x = np.float32([-1e4, -90.0, -20.0, -3.0, -0.7, -0.6931, -0.69, -1e-2, -1e-5, -2e-6])
    exact = np.float64(x)
    np.testing.assert_allclose(log1mexp(x), np.log(-np.expm1(exact)), rtol=1e-5, atol=1e-30)
    slope = jax.grad(lambda x: log1mexp(x).sum())(x)
    np.testing.assert_allclose(slope, -1 / np.expm1(np.minimum(-exact, 700)), rtol=1e-5, atol=1e-30)


def test_log1mexp_past_its_end_is_the_tangent():
    x = np.float32([-LOG1MEXP_LIMIT / 2, 0.0, 1e-6])  # rounding may even leave a log-probability above 0
    slope = -1 / np.expm1(LOG1MEXP_LIMIT)
    want = np.log(LOG1MEXP_LIMIT) + slope * (np.float64(x) + LOG1MEXP_LIMIT)
    np.testing.assert_allclose(log1mexp(x), want, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: log1mexp(x).sum())(x), slope, rtol=1e-5)
