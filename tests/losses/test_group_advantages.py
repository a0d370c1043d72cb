"""What a group says of its completions: baselines, which groups teach, overlong ends, tokens of high entropy."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.advantages import group_relative, high_entropy, leave_one_out, overlong, varied

WEIGHTS = jnp.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 1, 0, 0, 0]])


def rewards(seed, scale=3.0):
    return jnp.float32(np.random.default_rng(seed).normal(10, scale, WEIGHTS.shape))


def by_batch(x, weights):
    return group_relative(x, "batch", weights=weights)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("of", [leave_one_out, group_relative, by_batch])
@pytest.mark.parametrize("seed", range(3))
def test_advantages_of_a_group_sum_to_zero(of, weights, seed):
    x = rewards(seed)
    np.testing.assert_allclose(of(x, weights=weights).sum(1), 0.0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_shift_of_the_rewards_changes_nothing_and_a_scale_only_units(seed):
    x = rewards(seed)
    for of in (leave_one_out, lambda x: group_relative(x, "none"), lambda x: group_relative(x, eps=0.0)):
        np.testing.assert_allclose(of(x + 64.0), of(x), rtol=1e-4, atol=1e-4)
    # Each group by a shift of its own.
    shifts = jnp.array([[1.0], [-30.0], [500.0]])
    np.testing.assert_allclose(group_relative(x + shifts, "none"), group_relative(x, "none"), atol=1e-3)
    np.testing.assert_allclose(group_relative(7 * x, eps=0.0), group_relative(x, eps=0.0), rtol=1e-4)
    np.testing.assert_allclose(leave_one_out(7 * x), 7 * leave_one_out(x), rtol=1e-4)


def test_the_baseline_weighted_by_length_against_float64():
    x, lengths = rewards(0), jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])
    got = group_relative(x, "none", weights=WEIGHTS, lengths=lengths)
    share = np.float64(lengths * WEIGHTS)
    baseline = (share * np.float64(x)).sum(1, keepdims=True) / share.sum(1, keepdims=True)
    np.testing.assert_allclose(got, (np.float64(x) - baseline) * WEIGHTS, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((share * got).sum(1), 0.0, atol=1e-4)  # in the mean over tokens, then
    plain = group_relative(x, weights=WEIGHTS)
    np.testing.assert_allclose(
        group_relative(x, weights=WEIGHTS, lengths=jnp.full_like(lengths, 3)), plain, atol=1e-6
    )
    # The deviation is that of the plain mean.
    ratio = group_relative(x, weights=WEIGHTS, lengths=lengths, eps=0.0)[0] / got[0]
    np.testing.assert_allclose(ratio, 1 / np.float64(x[0]).std(ddof=1), rtol=1e-4)
    assert not group_relative(jnp.full((1, 3), 0.1), lengths=jnp.array([[1, 2, 3]])).any()


def test_which_groups_teach():
    x = jnp.array([[0.1, 0.1, 0.1], [0.0, 1.0, 0.0], [5.0, 5.0, 9.0], [jnp.nan, 2.0, 2.0], [1.0, 2.0, 3.0]])
    weights = jnp.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0]])
    assert varied(x, weights).tolist() == [False, True, False, False, False]
    assert varied(x[:3]).tolist() == [False, True, True]
    advantages = group_relative(x, weights=weights)
    assert (np.asarray(advantages) != 0).any(1).tolist() == varied(x, weights).tolist()


def test_b5_overlong_is_counted_in_tokens_and_grows_through_the_buffer():
    # Yu et al. 2025, eq. 13, with 20 tokens allowed and a buffer of 4, at the penalty of 1; the wrong code takes the
    # length of the text, four times as much.
    lengths = jnp.array([[0, 15, 16, 17, 18, 20]])
    np.testing.assert_allclose(overlong(lengths, 20, 4), [[0, 0, 0, 0.25, 0.5, 1.0]])
    np.testing.assert_allclose(overlong(jnp.array([1, 2, 4]), 4, 4), [0.25, 0.5, 1.0])


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_of_highest_entropy_are_those_above_the_quantile(fraction, seed):
    rng = np.random.default_rng(seed)
    entropies = np.float32(rng.exponential(size=(4, 16)))
    mask = np.arange(16) < np.array([[16], [3], [0], [11]])
    got = np.asarray(high_entropy(jnp.where(mask, entropies, jnp.nan), jnp.asarray(mask), fraction))
    threshold = np.quantile(np.float64(entropies[mask]), 1 - fraction) - 1e-6
    np.testing.assert_array_equal(got, mask & (entropies >= threshold))
    assert got.sum() >= 1 and (fraction < 1 or got.sum() == mask.sum())


def test_high_entropy_of_ties_and_of_nothing():
    assert high_entropy(jnp.ones((1, 4)), jnp.array([[1, 1, 1, 0]]), 0.2).tolist() == [
        [True, True, True, False]
    ]
    assert not high_entropy(jnp.full((1, 4), jnp.nan), jnp.zeros((1, 4)), 0.2).any()
    # 1 + floor(0.1 * 30) = 4 of 31, though 0.1 * 30 is below 3 in float32.
    assert high_entropy(jnp.arange(31.0)[None], jnp.ones((1, 31)), 0.1).sum() == 4
