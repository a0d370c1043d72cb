"""Masked mean and whitening against float64 over the real entries alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.masking import is_last, masked_mean, masked_whiten

MASK = np.array([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]])


def values(seed=0, scale=1.0):
    return np.float32(np.random.default_rng(seed).normal(3.0, scale, MASK.shape))


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_mean_is_over_real_entries(axis):
    x = values()
    got = masked_mean(jnp.where(MASK > 0, x, jnp.nan), jnp.array(MASK), axis)
    expected = (np.float64(x) * MASK).sum(axis) / np.maximum(MASK.sum(axis), 1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, bool])
def test_mean_is_summed_in_float32(dtype):
    # 4096 ones: a bfloat16 sum would stop at 256.
    x = jnp.ones((8, 512), dtype)
    assert float(masked_mean(x, jnp.ones((8, 512), bool))) == 1.0


def test_an_empty_mask_is_0_without_gradient():
    value, grad = jax.value_and_grad(lambda x: masked_mean(x, jnp.zeros((2, 3))))(jnp.full((2, 3), jnp.inf))
    assert value == 0 and not grad.any()


def test_gradient_is_one_over_the_count_and_0_elsewhere():
    grad = jax.grad(lambda x: masked_mean(x, jnp.array(MASK)))(jnp.where(MASK > 0, values(), jnp.nan))
    np.testing.assert_allclose(grad, MASK / MASK.sum(), rtol=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_whitening(unbiased, shift_mean, scale):
    x = values(1, scale)
    got = masked_whiten(jnp.where(MASK > 0, x, jnp.inf), jnp.array(MASK), shift_mean, unbiased)
    real = np.float64(x)[MASK > 0]
    expected = (real - real.mean()) / np.sqrt(real.var(ddof=int(unbiased)) + 1e-8)
    expected += 0 if shift_mean else real.mean()
    np.testing.assert_allclose(got[MASK > 0], expected, rtol=1e-3 if scale < 1 else 1e-5)
    assert not got[MASK == 0].any()


def test_whitening_of_equal_and_of_single_entries_is_finite():
    assert not masked_whiten(jnp.full(MASK.shape, 7.0), jnp.array(MASK)).any()
    assert not masked_whiten(jnp.full((1, 1), 7.0), jnp.ones((1, 1))).any()
    assert not masked_whiten(jnp.full((1, 1), jnp.nan), jnp.zeros((1, 1))).any()


def test_whitening_gradient(slope_of):
    x, weights = values(2), np.random.default_rng(3).normal(size=MASK.shape)

    def reference(x):
        real = x[MASK > 0]
        white = np.zeros(x.shape)
        white[MASK > 0] = (real - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8)
        return (white * weights).sum()

    ours = lambda x: (masked_whiten(x, jnp.array(MASK)) * jnp.float32(weights)).sum()
    got = jax.grad(ours)(jnp.where(MASK > 0, x, jnp.nan))
    np.testing.assert_allclose(got, slope_of(reference, x), atol=1e-5)


def test_the_last_real_token():
    expected = [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(is_last(jnp.array(MASK)), np.array(expected, bool))
    np.testing.assert_array_equal(is_last(jnp.array(MASK, jnp.float32)), np.array(expected, bool))


@pytest.mark.parametrize("unbiased", [True, False])
def test_whitened_entries_have_mean_0_and_variance_1(unbiased):
    x, mask = np.random.default_rng(4).normal(-7, 3, (5, 9)), np.random.default_rng(5).integers(0, 2, (5, 9))
    white = masked_whiten(jnp.float32(x), jnp.array(mask), unbiased=unbiased)
    real = np.float64(white)[mask > 0]
    np.testing.assert_allclose(real.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(real.var(ddof=int(unbiased)), 1, rtol=1e-5)
    # Without the shift the mean is kept, and the spread is the same.
    scaled = np.float64(masked_whiten(jnp.float32(x), jnp.array(mask), False, unbiased))[mask > 0]
    np.testing.assert_allclose(scaled.mean(), x[mask > 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(scaled.var(ddof=int(unbiased)), 1, rtol=1e-4)


def test_whitening_of_integers_and_half_precision_is_float32():
    for dtype in (jnp.int32, jnp.bfloat16):
        got = masked_whiten(jnp.array([[1, 2, 4]], dtype), jnp.ones((1, 3), bool))
        assert got.dtype == jnp.float32
        expected = (np.array([1, 2, 4]) - 7 / 3) / np.std([1, 2, 4], ddof=1)
        np.testing.assert_allclose(got[0], expected, rtol=1e-6)


def test_epsilon_is_inside_the_root():
    # Variance 1e-8 (biased) under a root of 2e-8: outside it, the result would be about 0.9999.
    got = masked_whiten(jnp.array([[1e-4, -1e-4]]), jnp.ones((1, 2)), unbiased=False)
    np.testing.assert_allclose(got, [[0.5**0.5, -(0.5**0.5)]], rtol=1e-4)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(AssertionError):
        masked_mean(jnp.ones((2, 3)), jnp.ones((1, 3)))
