"""Completion cross-entropy by hand, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.supervised import completion_cross_entropy

MASK = jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
LOGPROBS = jnp.array([[-1.0, -3.0, jnp.nan], [-5.0, jnp.inf, 0.0], [jnp.nan, jnp.nan, jnp.nan]])


def test_mean_over_tokens_not_over_rows():
    value, grad = jax.value_and_grad(completion_cross_entropy)(LOGPROBS, MASK)
    np.testing.assert_allclose(value, 3.0)  # (1 + 3 + 5) / 3; a mean of row means would be 3.5
    np.testing.assert_allclose(grad, -MASK / 3.0, rtol=1e-6)


def test_nothing_to_learn_from_is_0():
    assert completion_cross_entropy(LOGPROBS, jnp.zeros((3, 3))) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_against_float64(seed, slope_of):
    rng = np.random.default_rng(seed)
    mask = (np.arange(7) < rng.integers(0, 8, (4, 1))).astype(np.int32)
    mask[0] = 0
    logprobs = np.float32(-rng.exponential(3.0, (4, 7)))
    reference = lambda lp: -(lp * mask).sum() / max(mask.sum(), 1)
    dirty = jnp.where(mask > 0, logprobs, jnp.nan)
    value, grad = jax.value_and_grad(completion_cross_entropy)(dirty, jnp.array(mask))
    np.testing.assert_allclose(value, reference(np.float64(logprobs)), rtol=1e-5)
    np.testing.assert_allclose(grad, slope_of(reference, logprobs), atol=1e-6)
    # More padding, and half-precision numbers: the same tokens, so the same mean in float32.
    wide = [jnp.pad(x, ((0, 2), (0, 3))) for x in (dirty, jnp.array(mask))]
    np.testing.assert_allclose(completion_cross_entropy(*wide), value, rtol=1e-6)
    half = completion_cross_entropy(dirty.astype(jnp.bfloat16), jnp.array(mask, bool))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, value, rtol=1e-2)


def test_huge_losses_stay_finite():
    value, grad = jax.value_and_grad(completion_cross_entropy)(jnp.full((1, 2), -1e4), jnp.ones((1, 2)))
    np.testing.assert_allclose(value, 1e4)
    np.testing.assert_allclose(grad, -0.5)
