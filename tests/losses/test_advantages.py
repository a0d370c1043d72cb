"""Shaped rewards, GAE, returns and group baselines against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.advantages import (
    SCALES,
    discounted_returns,
    gae,
    group_relative,
    leave_one_out,
    n_step_returns,
    shaped_rewards,
)

MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]])


def arrays(n, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return [np.float32(rng.normal(0, scale, MASK.shape)) for _ in range(n)]


def dirty(x):
    """NaN wherever nothing may be read."""
    return jnp.where(MASK > 0, x, jnp.nan)


def gae_reference(rewards, values, gamma, lam):
    advantages = np.zeros(MASK.shape)
    for b in range(len(MASK)):
        advantage = value = 0.0
        for t in reversed(np.flatnonzero(MASK[b])):
            delta = float(rewards[b, t]) + gamma * value - float(values[b, t])
            advantage, value = delta + gamma * lam * advantage, float(values[b, t])
            advantages[b, t] = advantage
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_gae(gamma, lam, scale):
    rewards, values = arrays(2, scale=scale)
    advantages, returns = gae(dirty(rewards), dirty(values), jnp.array(MASK), gamma, lam)
    expected = gae_reference(rewards, values, gamma, lam)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(returns, (expected + values) * MASK, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_n_step_returns(n, gamma):
    """Row 4 has a gap, which is stepped over."""
    rewards, values = arrays(2)
    expected = np.zeros(MASK.shape)
    for b in range(len(MASK)):
        steps = np.flatnonzero(MASK[b])
        for i, t in enumerate(steps):
            expected[b, t] = sum(gamma**k * np.float64(rewards[b, u]) for k, u in enumerate(steps[i : i + n]))
            if i + n < len(steps):
                expected[b, t] += gamma**n * np.float64(values[b, steps[i + n]])
    advantages, returns = n_step_returns(dirty(rewards), dirty(values), jnp.array(MASK), n, gamma)
    np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(advantages, expected - values * MASK, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n, lam", [(1, 0.0), (5, 1.0), (99, 1.0)])
def test_one_step_and_all_steps_are_the_ends_of_gae(n, lam):
    rewards, values = arrays(2, 3)
    arguments = dirty(rewards), dirty(values), jnp.array(MASK)
    for ours, theirs in zip(n_step_returns(*arguments, n, 0.9), gae(*arguments, 0.9, lam), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_n_step_returns_by_hand():
    # 1 + 0.5 * 2 + 0.25 * V_2 = 2 + 0.25 * 8; then 2 + 0.5 * 4; then 4 alone.
    rewards, values = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0.0, 0.0, 8.0]])
    advantages, returns = n_step_returns(rewards, values, jnp.ones((1, 3)), 2, 0.5)
    np.testing.assert_allclose(returns, [[4.0, 4.0, 4.0]])
    np.testing.assert_allclose(advantages, [[4.0, 4.0, -4.0]])


def test_gae_by_hand_steps_over_a_gap():
    # Last token first: delta = 1 - 0.5 = 0.5. Then, over the gap: 0 + 0.5 - 0.2 + 0.5 * 0.5 = 0.55.
    rewards, values = jnp.array([[0.0, 9.0, 1.0]]), jnp.array([[0.2, 9.0, 0.5]])
    advantages, returns = gae(rewards, values, jnp.array([[1, 0, 1]]), 1.0, 0.5)
    np.testing.assert_allclose(advantages, [[0.55, 0.0, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0.75, 0.0, 1.0]], rtol=1e-6)


def test_with_lam_1_returns_do_not_depend_on_values():
    rewards, values = arrays(2)
    _, returns = gae(dirty(rewards), dirty(values), jnp.array(MASK), 0.9, 1.0)
    np.testing.assert_allclose(
        returns, discounted_returns(dirty(rewards), jnp.array(MASK), 0.9), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_discounted_returns(gamma):
    (rewards,) = arrays(1)
    expected = np.zeros(MASK.shape)
    for b in range(len(MASK)):
        steps = np.flatnonzero(MASK[b])
        for i, t in enumerate(steps):
            expected[b, t] = sum(gamma**k * float(rewards[b, u]) for k, u in enumerate(steps[i:]))
    np.testing.assert_allclose(
        discounted_returns(dirty(rewards), jnp.array(MASK), gamma), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_shaped_rewards(kind):
    logprobs, ref = arrays(2)
    scores = np.float32([0.7, -1.0, 2.0, np.nan, 0.25])  # of the row without tokens: never read
    got = shaped_rewards(jnp.array(scores), dirty(logprobs), dirty(ref), jnp.array(MASK), 0.1, kind)
    d = np.float64(logprobs) - ref
    kl = {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[kind]
    expected = -0.1 * kl * MASK
    for b, t in ((0, 4), (1, 1), (2, 0), (4, 4)):
        expected[b, t] += scores[b]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_shaped_rewards_by_hand_and_with_a_traced_coefficient():
    logprobs, ref = jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[-1.5, -1.0, -9.0]])
    mask = jnp.array([[1, 1, 0]])
    got = jax.jit(lambda c: shaped_rewards(jnp.array([0.7]), logprobs, ref, mask, c))(0.2)
    np.testing.assert_allclose(got, [[-0.1, 0.2 + 0.7, 0.0]], rtol=1e-6)


def test_b1_rewards_keep_their_fraction_and_integers_become_floats():
    """A well-known PPO scatters scores into an array made like the ids, and 0.7 becomes 0."""
    zeros, mask = jnp.zeros((2, 3)), jnp.array([[1, 1, 0], [1, 1, 1]])
    np.testing.assert_allclose(
        shaped_rewards(jnp.array([0.7, -0.3]), zeros, zeros, mask, 0.0).sum(1), [0.7, -0.3], rtol=1e-6
    )
    whole = shaped_rewards(jnp.array([1, 2]), zeros + 0.5, zeros, mask, 0.1)
    assert whole.dtype == jnp.float32
    np.testing.assert_allclose(whole.sum(1), [0.9, 1.85], rtol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("G", [2, 5])
def test_group_relative(scale, G):
    rewards = np.float32(np.random.default_rng(G).normal(10, 3, (4, G)))
    x = np.float64(rewards)
    deviation = {"group": x.std(1, ddof=1, keepdims=True), "batch": x.std(ddof=1), "none": None}[scale]
    expected = x - x.mean(1, keepdims=True)
    expected = expected if deviation is None else expected / (deviation + 1e-4)
    np.testing.assert_allclose(group_relative(jnp.array(rewards), scale), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(group_relative(jnp.array(rewards), scale).sum(1), 0, atol=1e-4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_are_exactly_0(scale):
    rewards = jnp.array([[0.1, 0.1, 0.1], [0.7, 0.7, 0.7], [0.0, 1.0, 0.0]])
    got = group_relative(rewards, scale)
    assert not got[:2].any() and got[2].any()
    assert not group_relative(jnp.full((2, 1), 3.0), "group").any()


def test_scale_none_leaves_reward_units_and_unknown_scales_are_named():
    got = group_relative(jnp.array([[1, 2, 6]]), "none")
    np.testing.assert_allclose(got, [[-2.0, -1.0, 3.0]])
    with pytest.raises(ValueError, match="expected one of group, batch, none"):
        group_relative(jnp.ones((1, 2)), "std")


def test_leave_one_out():
    rewards = np.random.default_rng(0).normal(5, 2, (3, 4))
    expected = np.array([[row[i] - np.delete(row, i).mean() for i in range(4)] for row in rewards])
    np.testing.assert_allclose(leave_one_out(jnp.float32(rewards)), expected, rtol=1e-5, atol=1e-5)
    assert not leave_one_out(jnp.full((2, 3), 0.1)).any()


def test_leave_one_out_of_a_group_of_one_is_the_reward_itself():
    got = leave_one_out(jnp.array([[3], [-2]]))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [[3.0], [-2.0]])


@pytest.mark.parametrize("of", [leave_one_out, *(functools.partial(group_relative, scale=s) for s in SCALES)])
def test_what_weighs_nothing_is_in_no_group(of):
    """Each row gets what it would with the rest alone; its own value, NaN included, is never read."""
    rewards = np.float32(np.random.default_rng(1).normal(5, 2, (2, 4)))
    weights = np.array([[0, 1, 1, 1], [1, 0, 1, 1]], np.float32)
    got = of(jnp.where(weights > 0, rewards, jnp.nan), weights=jnp.asarray(weights))
    kept = rewards[weights > 0].reshape(2, 3)
    np.testing.assert_allclose(got[weights > 0].reshape(2, 3), of(jnp.asarray(kept)), rtol=1e-5)
    assert not got[weights == 0].any()
    nothing = of(jnp.full((1, 3), jnp.nan), weights=jnp.zeros((1, 3)))
    assert not nothing.any()  # NaN would be true


@pytest.mark.parametrize("seed", range(3))
def test_with_lam_1_advantages_are_returns_less_values(seed):
    """Values telescope away: A = (sum of the rewards from here on, discounted) - V."""
    rewards, values = arrays(2, seed)
    advantages, returns = gae(dirty(rewards), dirty(values), jnp.array(MASK), 0.9, 1.0)
    monte_carlo = discounted_returns(dirty(rewards), jnp.array(MASK), 0.9)
    np.testing.assert_allclose(advantages, monte_carlo - values * MASK, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(advantages, returns - values * MASK, rtol=1e-5, atol=1e-5)


def test_more_padding_changes_nothing():
    """Columns and a row of padding, filled with NaN, around the same tokens."""
    rewards, values = arrays(2, 4)
    logprobs, ref = arrays(2, 5)
    wider = lambda x, fill: jnp.pad(jnp.asarray(x), ((0, 1), (0, 3)), constant_values=fill)
    mask = wider(MASK, 0)
    narrow = gae(dirty(rewards), dirty(values), jnp.array(MASK))
    wide = gae(wider(dirty(rewards), jnp.nan), wider(dirty(values), jnp.nan), mask)
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_array_equal(wider(a, 0), b)
    scores = jnp.arange(1.0, 6.0)
    narrow = shaped_rewards(scores, dirty(logprobs), dirty(ref), jnp.array(MASK), 0.1)
    wide = shaped_rewards(
        jnp.pad(scores, (0, 1)), wider(dirty(logprobs), jnp.nan), wider(dirty(ref), jnp.nan), mask, 0.1
    )
    np.testing.assert_array_equal(wider(narrow, 0), wide)


@pytest.mark.parametrize("T", [1, 2])
def test_completions_of_one_token(T):
    """A = r - V whatever gamma and lam are: V is 0 after the last token."""
    rewards, values = jnp.array([[2.0, jnp.nan]])[:, :T], jnp.array([[0.5, jnp.nan]])[:, :T]
    mask = jnp.array([[1, 0]])[:, :T]
    advantages, returns = gae(rewards, values, mask, 0.3, 0.7)
    np.testing.assert_array_equal(advantages, [[1.5, 0.0][:T]])
    np.testing.assert_array_equal(returns, [[2.0, 0.0][:T]])


def test_shaped_rewards_gradient_stays_inside_the_mask(slope_of):
    logprobs, ref = arrays(2, 6)
    weights = np.random.default_rng(7).normal(size=MASK.shape)
    scores = np.zeros(len(MASK), np.float32)

    def reference(lp):
        d = lp - ref
        return (-0.1 * (np.exp(-d) - 1 + d) * MASK * weights).sum()

    ours = lambda lp: (
        shaped_rewards(jnp.array(scores), lp, dirty(ref), jnp.array(MASK), 0.1, "k3") * jnp.float32(weights)
    ).sum()
    np.testing.assert_allclose(jax.grad(ours)(dirty(logprobs)), slope_of(reference, logprobs), atol=1e-5)


def test_half_precision_inputs_are_summed_in_float32():
    # 1 / 256 is exact in bfloat16, but a bfloat16 sum of 1000 of them stops at 1.
    rewards = jnp.full((1, 1000), 1 / 256, jnp.bfloat16)
    got = discounted_returns(rewards, jnp.ones((1, 1000)))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0, 0], 1000 / 256, rtol=1e-6)
