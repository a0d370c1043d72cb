"""What is chosen by score, against sorting by hand; what does not count is never read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.selection import best_and_worst, best_of_group, quantiles


def test_the_best_of_each_group_best_first():
    scores = jnp.array([[1.0, 3.0, 2.0], [5.0, 5.0, -1.0], [jnp.nan, -jnp.inf, jnp.nan]])
    weights = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    indices, kept = best_of_group(scores, weights, 2)
    np.testing.assert_array_equal(indices[:2], [[1, 2], [0, 1]])
    np.testing.assert_array_equal(kept, [[1, 1], [1, 1], [1, 0]])
    assert indices[2, 0] == 1  # what does not count comes after what counts, whatever its score


def test_best_and_worst_and_nothing_to_prefer():
    scores = jnp.array([[1.0, 3.0, -2.0], [4.0, 4.0, 4.0], [9.0, 0.0, jnp.nan], [jnp.nan, 7.0, jnp.nan]])
    weights = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    indices, counts = best_and_worst(scores, weights)
    np.testing.assert_array_equal(indices[0], [1, 2])
    np.testing.assert_array_equal(counts, [1, 0, 0, 0])  # all equal; one that counts; one that counts
    weights = weights.at[2].set(jnp.array([1.0, 1.0, 0.0]))
    indices, counts = best_and_worst(scores, weights)
    assert indices[2].tolist() == [0, 1] and counts[2] == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("number", [2, 5])
def test_quantiles_are_equal_parts_of_the_sorted(seed, number):
    rng = np.random.default_rng(seed)
    scores, weights = rng.integers(0, 6, 23).astype(np.float32), (rng.random(23) < 0.8).astype(np.float32)
    scores[weights == 0] = np.nan
    found = np.asarray(jax.jit(quantiles, static_argnums=2)(scores, weights, number))
    real = np.flatnonzero(weights)
    order = sorted(real, key=lambda i: (scores[i], i))
    np.testing.assert_array_equal(found[order], [i * number // len(real) for i in range(len(real))])
    sizes = np.bincount(found[real], minlength=number)
    assert sizes.max() - sizes.min() <= 1 and (found[weights == 0] == 0).all()


def test_a_pool_that_is_smaller_than_the_number_of_quantiles():
    found = quantiles(jnp.array([2.0, jnp.nan, 1.0]), jnp.array([1.0, 0.0, 1.0]), 5)
    assert found[0] > found[2]
    np.testing.assert_array_equal(quantiles(jnp.full(4, jnp.nan), jnp.zeros(4), 5), 0)
