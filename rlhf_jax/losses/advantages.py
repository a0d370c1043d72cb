"""From scores to what each token, or each completion, is worth: shaped rewards, returns, advantages.

Knows rewards, values and masks. Sources: GAE, Schulman et al. 2016, arXiv:1506.02438, eq. 16; rewards with KL, Ziegler
et al. 2019, arXiv:1909.08593, eq. 2; group-relative, Shao et al. 2024, arXiv:2402.03300; leave-one-out, Kool et al.
2019 and Ahmadian et al. 2024, arXiv:2402.14740."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses.kl import kl_estimate
from rlhf_jax.losses.masking import is_last

SCALES = ("group", "batch", "none")


def shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coeff, kind="k1"):
    """-kl_coeff * KL at each token, and the score on the last real one.

    Args:
      scores: [B] reward units, of any dtype: integers do not make the rewards integers.
      logprobs, ref_logprobs: [B, T] nats. mask: [B, T].
      kl_coeff: reward units a nat. kind: estimator of losses/kl.py.
    Returns: [B, T] float32, 0 outside the mask; a row without a token gets nothing.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    real = mask > 0
    kl = kl_estimate(jnp.where(real, logprobs, 0.0), jnp.where(real, ref_logprobs, 0.0), kind)
    return rewards_less_kl(scores, kl, mask, kl_coeff)


def rewards_less_kl(scores, kl, mask, kl_coeff):
    """shaped_rewards of a KL that is known. kl: [B, T] nats, 0 outside the mask."""
    chex.assert_equal_shape([kl, mask])
    chex.assert_shape(scores, mask.shape[:1])
    scores = jnp.broadcast_to(scores.astype(jnp.float32)[:, None], mask.shape)
    return jnp.where(is_last(mask), scores, 0.0) - kl_coeff * kl


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation over each row's real tokens.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where t + 1 is the next real token and
    both are 0 after the last: tokens of a gap (a tool's answer, say) are stepped over as if they were not there.

    Args:
      rewards, values, mask: [B, T]. gamma: discount; lam: 0 trusts the values, 1 gives Monte Carlo returns.
    Returns: (advantages, returns = advantages + values), [B, T] float32, 0 outside the mask.
    """
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([rewards, values, mask])
    real = mask > 0
    rewards, values = (jnp.where(real, x.astype(jnp.float32), 0.0) for x in (rewards, values))

    def back(later, now):
        (advantage, value), (r, v, counts) = later, now
        new = r + gamma * value - v + gamma * lam * advantage
        advantage, value = jnp.where(counts, new, advantage), jnp.where(counts, v, value)
        return (advantage, value), jnp.where(counts, advantage, 0.0)

    nothing = jnp.zeros(mask.shape[0], jnp.float32)
    _, advantages = jax.lax.scan(back, (nothing, nothing), (rewards.T, values.T, real.T), reverse=True)
    return advantages.T, advantages.T + values


def discounted_returns(rewards, mask, gamma=1.0):
    """[B, T] float32: each real token's reward and the discounted rewards of the real tokens after it; 0 elsewhere."""
    return gae(rewards, jnp.zeros(mask.shape, jnp.float32), mask, gamma, 1.0)[0]


def group_relative(rewards, scale="group", eps=1e-4, weights=None):
    """Each reward less the mean of its group, over a deviation.

    Args:
      rewards: [B, G]. scale: by the deviation of the group or of the batch (unbiased, with eps added), or none.
      weights: [B, G], 0 takes a completion out of every mean and deviation; None: all count.
    Returns: [B, G] float32. Groups of equal rewards are exactly 0: they teach nothing, not rounding.
    Raises: ValueError for another scale.
    """
    chex.assert_rank(rewards, 2)
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; expected one of {', '.join(SCALES)}.")
    counts = jnp.ones(rewards.shape, bool) if weights is None else weights > 0
    centred = _less_mean(rewards, counts)
    if scale == "none":
        return centred
    if scale == "group":
        spread, n = centred, counts
    else:
        spread, n = _less_mean(rewards.reshape(1, -1), counts.reshape(1, -1)), counts.reshape(1, -1)
    n = n.sum(1, keepdims=True)
    deviation = jnp.sqrt(jnp.square(spread).sum(1, keepdims=True) / jnp.maximum(n - 1, 1))
    return centred / jnp.broadcast_to(deviation + eps, centred.shape)


def leave_one_out(rewards, weights=None):
    """[B, G] float32: each reward less the mean of the others of its group.

    A group of one has no others, so no baseline: its advantage is the reward itself, as in plain REINFORCE.

    Args:
      weights: [B, G], 0 takes a completion out of its group; None: all count.
    """
    chex.assert_rank(rewards, 2)
    counts = jnp.ones(rewards.shape, bool) if weights is None else weights > 0
    n = jnp.broadcast_to(counts.sum(1, keepdims=True), rewards.shape)
    alone = jnp.where(counts, rewards.astype(jnp.float32), 0.0)
    return jnp.where(n > 1, _less_mean(rewards, counts) * (n / jnp.maximum(n - 1, 1)), alone)


def _less_mean(x, counts):
    """[B, G] x minus the mean of each row, 0 where it does not count. Exactly 0 where all of a row are equal: the mean
    of three 0.1 need not be 0.1 in float32."""
    x = jnp.where(counts, x.astype(jnp.float32), 0.0)
    first = jnp.take_along_axis(x, counts.argmax(1, keepdims=True), axis=1)
    shifted = jnp.where(counts, x - first, 0.0)
    mean = shifted.sum(1, keepdims=True) / jnp.maximum(counts.sum(1, keepdims=True), 1)
    return jnp.where(counts, shifted - mean, 0.0)
