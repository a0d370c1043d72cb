"""From scores to what each token, or each completion, is worth: shaped rewards, returns, advantages.

Knows rewards, values and masks. Sources: GAE, Schulman et al. 2016, arXiv:1506.02438, eq. 16; rewards with KL, Ziegler
et al. 2019, arXiv:1909.08593, eq. 2; n-step returns, Mnih et al. 2016, arXiv:1602.01783; group-relative, Shao et al.
2024, arXiv:2402.03300; weighted by length, Hao et al. 2025, arXiv:2505.23585 (OPO); leave-one-out, Kool et al. 2019 and
Ahmadian et al. 2024, arXiv:2402.14740; overlong completions and tokens of high entropy, Yu et al. 2025 (DAPO),
arXiv:2503.14476, eq. 13, and Wang et al. 2025, arXiv:2506.01939."""

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


def n_step_returns(rewards, values, mask, n, gamma=1.0):
    """The next n rewards, and the value of what comes after them.

    R_t = r_t + gamma r_{t+1} + ... + gamma^(n-1) r_{t+n-1} + gamma^n V_{t+n}, over real tokens as in `gae`; both are 0
    after the last. n = 1 is GAE at lam 0; n of the whole length is Monte Carlo, lam 1.

    Args:
      rewards, values, mask: [B, T]. n: tokens, static, at least 1. gamma: discount.
    Returns: (advantages = returns - values, returns), [B, T] float32, 0 outside the mask.
    """
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([rewards, values, mask])
    real = mask > 0
    rewards, values = (jnp.where(real, x.astype(jnp.float32), 0.0) for x in (rewards, values))
    n = min(n, mask.shape[1])
    discounts = jnp.asarray(gamma, jnp.float32) ** jnp.arange(1, n + 1, dtype=jnp.float32)

    def back(later, now):
        (r_later, v_later), (r, v, counts) = later, now  # of the n real tokens after this one
        new = r + (discounts[None, :-1] * r_later[:, :-1]).sum(1) + discounts[-1] * v_later[:, -1]
        push = lambda x, window: jnp.where(
            counts[:, None], jnp.concatenate([x[:, None], window[:, :-1]], axis=1), window
        )
        return (push(r, r_later), push(v, v_later)), jnp.where(counts, new, 0.0)

    nothing = jnp.zeros((mask.shape[0], n), jnp.float32)
    _, returns = jax.lax.scan(back, (nothing, nothing), (rewards.T, values.T, real.T), reverse=True)
    return returns.T - values, returns.T


def discounted_returns(rewards, mask, gamma=1.0):
    """[B, T] float32: each real token's reward and the discounted rewards of the real tokens after it; 0 elsewhere."""
    return gae(rewards, jnp.zeros(mask.shape, jnp.float32), mask, gamma, 1.0)[0]


def group_relative(rewards, scale="group", eps=1e-4, weights=None, lengths=None):
    """Each reward less the mean of its group, over a deviation.

    Args:
      rewards: [B, G]. scale: by the deviation of the group or of the batch (unbiased, with eps added), or none.
      weights: [B, G], 0 takes a completion out of every mean and deviation; None: all count.
      lengths: [B, G] tokens; the mean that is subtracted is weighted by them, OPO's baseline of least variance. The
        deviation stays the plain one. None: the plain mean.
    Returns: [B, G] float32. Groups of equal rewards are exactly 0: they teach nothing, not rounding.
    Raises: ValueError for another scale.
    """
    chex.assert_rank(rewards, 2)
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; expected one of {', '.join(SCALES)}.")
    counts = jnp.ones(rewards.shape, bool) if weights is None else weights > 0
    spread, n = _less_mean(rewards, counts), counts
    centred = spread
    if lengths is not None:
        share = jnp.where(counts, lengths.astype(jnp.float32), 0.0)
        total = jnp.maximum(share.sum(1, keepdims=True), 1.0)
        centred = jnp.where(counts, spread - (share * spread).sum(1, keepdims=True) / total, 0.0)
    if scale == "none":
        return centred
    if scale == "batch":
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


def varied(rewards, weights=None):
    """[B] bool: whether the rewards [B, G] of a group differ, so that it teaches anything. weights: as above."""
    counts = jnp.ones(rewards.shape, bool) if weights is None else weights > 0
    return jnp.where(counts, rewards, -jnp.inf).max(1) > jnp.where(counts, rewards, jnp.inf).min(1)


def overlong(lengths, max_length, buffer_tokens):
    """How far each completion reaches into the last `buffer_tokens` of the `max_length` allowed: 0 before them, 1 at
    their end.

    lengths: [...] in tokens, as the mask counts them, never in characters. Returns: [...] float32.
    """
    return jnp.clip((lengths - (max_length - buffer_tokens)) / buffer_tokens, 0.0, 1.0).astype(jnp.float32)


def high_entropy(entropies, mask, fraction):
    """[B, T] bool: the `fraction` of the real tokens of the whole batch with the highest entropy.

    Of n tokens 1 + floor((n - 1) * fraction), as many as lie at or above the quantile 1 - fraction; ties stay together.

    Args:
      entropies: [B, T] nats. mask: [B, T]. fraction: in (0, 1], static.
    """
    chex.assert_equal_shape([entropies, mask])
    real = mask > 0
    ordered = jnp.sort(jnp.where(real, entropies, -jnp.inf).ravel(), descending=True)
    # The small amount is for products such as 0.1 * 30, which float32 may put just below a whole number.
    last = jnp.floor((jnp.maximum(real.sum(), 1) - 1) * fraction + 1e-4).astype(jnp.int32)
    return real & (entropies >= ordered[last])


def _less_mean(x, counts):
    """[B, G] x minus the mean of each row, 0 where it does not count. Exactly 0 where all of a row are equal: the mean
    of three 0.1 need not be 0.1 in float32."""
    x = jnp.where(counts, x.astype(jnp.float32), 0.0)
    first = jnp.take_along_axis(x, counts.argmax(1, keepdims=True), axis=1)
    shifted = jnp.where(counts, x - first, 0.0)
    mean = shifted.sum(1, keepdims=True) / jnp.maximum(counts.sum(1, keepdims=True), 1)
    return jnp.where(counts, shifted - mean, 0.0)
