"""Completion cross-entropy by hand, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses.supervised import completion_cross_entropy

MASK = jnp.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
LOGPROBS = jnp.array([[-1.0, -3.0, jnp.nan], [-5.0, jnp.inf, 0.0], [jnp.nan, jnp.nan, jnp.nan]])


def test_mean_over_tokens_not_over_rows():
    value, grad = jax.value_and_grad(completion_cross_entropy)(LOGPROBS, MASK)
    np.testing.assert_allclose(value, 3.0)  # (1 + 3 + 5) / 3; a mean of row means would be 3.5
    np.testing.assert_allclose(grad, -MASK / 3.0, rtol=1e-6)


def test_nothing_to_learn_from_is_0():
    assert completion_cross_entropy(LOGPROBS, jnp.zeros((3, 3))) == 0.0
