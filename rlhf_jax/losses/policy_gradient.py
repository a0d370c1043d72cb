"""Policy gradients without a clip: REINFORCE, A2C, RLOO, and the surrogate that TRPO maximises.

Knows log-probabilities, advantages and masks. Sources: Williams 1992; Mnih et al. 2016, arXiv:1602.01783; Ahmadian et
al. 2024, arXiv:2402.14740; the surrogate, Schulman et al. 2015, arXiv:1502.05477, eq. 14."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses.masking import masked_mean

LEVELS = ("token", "sequence")
LOG_RATIO_LIMIT = 20.0  # nats; exp(20) is far from any ratio that means something, and from overflow


def policy_gradient_loss(logprobs, old_logprobs, advantages, mask, level="token", clip_epsilon=None):
    """-mean of ratio * advantage. At ratio 1, so on-policy, its gradient is that of -mean of advantage * logprob.

    Args:
      logprobs: [B, T] nats; the only argument that carries gradient.
      old_logprobs: [B, T] nats, under the policy that sampled, at the sampling temperature.
      advantages: [B, T] reward units, one a token; or [B], one a completion.
      mask: [B, T], 1 where the token counts. Entries elsewhere are never read, NaN included.
      level: "token": each token has its own ratio, and the mean is over tokens (Williams divides by completions: the
        same direction, shorter by their mean length). "sequence": the ratio of the whole completion, the product over
        its tokens, and the mean is over completions that have a token; needs advantages of [B].
      clip_epsilon: pessimistic bound on the ratio of a sequence to [1 - clip_epsilon, 1 + clip_epsilon], as TRL's RLOO
        has it; None: none. "sequence" only.
    Returns: (scalar float32 loss, metrics as losses/ppo.py has them, over the same tokens or completions).
    Raises: ValueError for another level, or a clip_epsilon at level "token". AssertionError if the shapes differ.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; expected one of {', '.join(LEVELS)}.")
    if clip_epsilon is not None and level == "token":
        raise ValueError("clip_epsilon at level 'token' is PPO's loss: use losses/ppo.py.")
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([logprobs, old_logprobs, mask])
    real = lambda x: jnp.where(mask > 0, jnp.asarray(x, jnp.float32), 0.0)
    log_ratio = real(logprobs) - jax.lax.stop_gradient(real(old_logprobs))
    if level == "token":
        if advantages.ndim == 1:
            advantages = jnp.broadcast_to(advantages[:, None], mask.shape)
        chex.assert_equal_shape([advantages, mask])
        advantages, counts = real(advantages), mask
    else:
        chex.assert_shape(advantages, mask.shape[:1])
        counts = (mask > 0).any(axis=-1)
        advantages = jnp.where(counts, jnp.asarray(advantages, jnp.float32), 0.0)
        log_ratio = log_ratio.sum(-1)
    advantages = jax.lax.stop_gradient(advantages)
    log_ratio = jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = jnp.exp(log_ratio)
    bounded, clipped = ratio, jnp.zeros(ratio.shape, bool)
    if clip_epsilon is not None:
        low = (ratio < 1.0 - clip_epsilon) & (advantages < 0)
        high = (ratio > 1.0 + clip_epsilon) & (advantages > 0)
        bounded = jnp.where(low, 1.0 - clip_epsilon, jnp.where(high, 1.0 + clip_epsilon, ratio))
        clipped = low | high
    metrics = {
        "ratio_mean": masked_mean(ratio, counts),
        "clip_fraction": masked_mean(clipped, counts),
        "approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, counts),
        "ratio_max_gap": jnp.abs(ratio - 1.0).max(),
    }
    return -masked_mean(bounded * advantages, counts), jax.lax.stop_gradient(metrics)
