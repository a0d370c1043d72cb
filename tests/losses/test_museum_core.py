"""Mistakes found in well-known PPO trainers, each of which must fail here.

Each test says what the wrong code computes, and checks that ours computes something else, and the right thing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.advantages import gae, group_relative, leave_one_out, shaped_rewards
from rlhf_jax.losses.masking import masked_mean, masked_whiten
from rlhf_jax.losses.ppo import clipped_policy_loss, clipped_value_loss

IDS = jnp.array([[11, 12, 2, 0], [13, 2, 0, 0]])  # 2 ends a completion, 0 is padding
MASK = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_b1_rewards_are_floats_whatever_the_scores_and_masks_are(dtype):
    # Rewards made like the token ids are int32: a score of 0.7 scattered into them becomes 0, and so does any KL.
    scores = jnp.array([0.75, -1.5]) if dtype != jnp.int32 else jnp.array([3, -1])
    zeros = jnp.zeros(IDS.shape)
    for mask in (MASK, MASK.astype(IDS.dtype), MASK.astype(bool), MASK.astype(jnp.float32)):
        rewards = shaped_rewards(scores.astype(dtype), zeros + 0.5, zeros, mask, 0.25)
        assert rewards.dtype == jnp.float32
        a, b = np.float64(scores)
        # -0.25 * 0.5 nats a token, and the score on the last.
        expected = [[-0.125, -0.125, a - 0.125, 0], [-0.125, b - 0.125, 0, 0]]
        np.testing.assert_allclose(rewards, expected, rtol=1e-6)
        advantages, returns = gae(rewards, zeros, mask, 1.0, 1.0)
        assert advantages.dtype == returns.dtype == jnp.float32
        np.testing.assert_allclose(returns[:, 0], [a - 0.375, b - 0.25], rtol=1e-6)


def test_b1_integer_rewards_have_fractional_advantages():
    rewards = jnp.array([[0, 0, 1], [1, 1, 0]])
    third = 1 / 3
    np.testing.assert_allclose(
        group_relative(rewards, "none"),
        [[-third, -third, 2 * third], [third, third, -2 * third]],
        rtol=1e-6,
    )
    np.testing.assert_allclose(leave_one_out(rewards), [[-0.5, -0.5, 1.0], [0.5, 0.5, -1.0]], rtol=1e-6)
    assert masked_whiten(jnp.array([[1, 2, 4]]), jnp.ones((1, 3))).dtype == jnp.float32
    advantages, _ = gae(jnp.array([[0, 1]]), jnp.array([[0, 0]]), jnp.array([[1, 1]]), 1.0, 0.5)
    np.testing.assert_allclose(advantages, [[0.5, 1.0]])


@pytest.mark.parametrize("advantage", [1.0, 2.5])
def test_b2_the_clip_is_pessimistic_for_both_signs(advantage):
    # With max in place of min, A < 0 has slope 0.5 |A| at ratio 0.5 (what is far down already is pushed on) and 0 at
    # ratio 1.5 (a bad token that grew likelier is left alone).
    def slope(ratio, advantage):
        one, old = jnp.ones((1, 1)), jnp.full((1, 1), -1.0)
        loss = lambda lp: clipped_policy_loss(lp, old, advantage * one, one)[0]
        return float(jax.grad(loss)(old + jnp.log(ratio))[0, 0])

    assert slope(0.5, -advantage) == 0.0
    np.testing.assert_allclose(slope(1.5, -advantage), 1.5 * advantage, rtol=1e-5)  # uphill: down it goes
    assert slope(1.5, advantage) == 0.0
    np.testing.assert_allclose(slope(0.5, advantage), -0.5 * advantage, rtol=1e-5)


def test_b7_metrics_are_over_real_tokens_only():
    # Padding filled with log-probability 1.0 and averaged in: an entropy lower by 1 a pad, and ratios of 1 among ours.
    old = jnp.where(MASK > 0, -1.0, 1.0)
    logprobs = jnp.where(MASK > 0, -1.0 + jnp.log(1.5), 1.0)
    _, metrics = clipped_policy_loss(logprobs, old, jnp.ones(IDS.shape), MASK)
    np.testing.assert_allclose(metrics["ratio_mean"], 1.5, rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_fraction"], 1.0)
    np.testing.assert_allclose(metrics["approx_kl"], 0.5 - np.log(1.5), rtol=1e-5)
    np.testing.assert_allclose(masked_mean(-old, MASK), 1.0)
    moved = jnp.where(MASK > 0, 1.0, 0.0)
    _, metrics = clipped_value_loss(moved, moved * 0, -moved, MASK)
    assert (
        metrics["value_clip_fraction"] == 0.0
    )  # clipped to 0.2, errors 4 and 1.44: the clip is not the larger
    _, metrics = clipped_value_loss(moved, moved * 0, moved, MASK)
    assert metrics["value_clip_fraction"] == 1.0


def test_b8_b9_the_score_is_on_the_end_token_and_pad_may_equal_it():
    # One place after the end token, it is on padding; with the mask made from ids and pad == eos, one place before.
    zeros = jnp.zeros(IDS.shape)
    got = shaped_rewards(jnp.array([1.0, 2.0]), zeros, zeros, MASK, 0.1)
    np.testing.assert_array_equal(got, [[0, 0, 1.0, 0], [0, 2.0, 0, 0]])
    full = shaped_rewards(jnp.array([1.0, 2.0]), zeros, zeros, jnp.ones(IDS.shape), 0.1)
    np.testing.assert_array_equal(full, [[0, 0, 0, 1.0], [0, 0, 0, 2.0]])  # never stopped: no place after
