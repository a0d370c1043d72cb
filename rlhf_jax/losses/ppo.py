"""PPO's clipped objectives for policy and value.

Knows log-probabilities, values, advantages and masks; nothing of models, prompts or where rewards come from.
Sources: Schulman et al. 2017, arXiv:1707.06347; dual clip, Ye et al. 2020, arXiv:1912.09729; value clip and the halves,
OpenAI's lm-human-preferences."""

import chex
import jax
import jax.numpy as jnp
import optax

from rlhf_jax.losses.masking import masked_mean

LOG_RATIO_LIMIT = 20.0  # nats; exp(20) is far from any ratio that means something, and from overflow


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip_epsilon=0.2, dual_clip=None):
    """Pessimistic surrogate, eq. 7, as a mean over real tokens.

    Args:
      logprobs: [B, T] nats; the only argument that carries gradient.
      old_logprobs: [B, T] nats, under the policy that sampled, at the sampling temperature.
      advantages: [B, T] reward units.
      mask: [B, T], 1 where the token counts. Entries elsewhere are never read, NaN included.
      clip_epsilon: half-width of the interval around ratio 1, or (below, above).
      dual_clip: the largest ratio that a negative advantage is worth (3.0 is usual); None or 0: no limit.
    Returns: (scalar float32 loss, metrics over the same tokens). `approx_kl`: KL(old || new) in nats a token, by k3;
      `clip_fraction`: tokens whose gradient the clip took; `ratio_max_gap`: the largest |ratio - 1|. A ratio is kept
      within exp(+-20).
    Raises: AssertionError if the shapes differ.
    """
    chex.assert_rank(logprobs, 2)
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    below, above = clip_epsilon if isinstance(clip_epsilon, (tuple, list)) else (clip_epsilon, clip_epsilon)
    # Before exp, or NaN reaches the gradient.
    real = lambda x: jnp.where(mask > 0, x.astype(jnp.float32), 0.0)
    old_logprobs, advantages = jax.lax.stop_gradient((real(old_logprobs), real(advantages)))
    log_ratio = jnp.clip(real(logprobs) - old_logprobs, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = jnp.exp(log_ratio)
    # min(r A, clip(r) A) by cases: a token is bound where leaving the interval would pay, nowhere else. Written with
    # min and clip, a token on the edge of the interval (every one, on-policy with no width) has part of its gradient.
    low = (ratio < 1.0 - below) & (advantages < 0)
    high = (ratio > 1.0 + above) & (advantages > 0)
    bounded = jnp.where(low, 1.0 - below, jnp.where(high, 1.0 + above, ratio))
    clipped = low | high
    if dual_clip is not None:
        limit = jnp.where(jnp.asarray(dual_clip) > 0, dual_clip, jnp.inf)
        over = (bounded > limit) & (advantages < 0)
        bounded, clipped = jnp.where(over, limit, bounded), clipped | over
    metrics = {
        "ratio_mean": masked_mean(ratio, mask),
        "clip_fraction": masked_mean(clipped, mask),
        "approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "ratio_max_gap": jnp.abs(ratio - 1.0).max(),  # 1 outside the mask
    }
    return -masked_mean(bounded * advantages, mask), jax.lax.stop_gradient(metrics)


def clipped_value_loss(values, old_values, returns, mask, clip_range=0.2):
    """Half the squared error to the returns, or of values kept within clip_range of the old ones if that is worse.

    Args:
      values: [B, T] reward units; the only argument that carries gradient.
      old_values: [B, T], when the completion was sampled. returns: [B, T]. mask: [B, T].
      clip_range: reward units.
    Returns: (scalar float32 loss, metrics): `explained_variance` of the returns by the old values, 1 is perfect, 0
      where the returns do not vary; `value_clip_fraction`: tokens where the clipped error is the larger.
    Raises: AssertionError if the shapes differ.
    """
    values, old_values, returns = _real_values(values, old_values, returns, mask)
    moved = values - old_values
    # Inside the range the values themselves: old + (new - old) differs by rounding, which would count as clipped.
    clipped = jnp.where(
        jnp.abs(moved) > clip_range, old_values + jnp.clip(moved, -clip_range, clip_range), values
    )
    error, clipped_error = jnp.square(values - returns), jnp.square(clipped - returns)
    metrics = _explained(old_values, returns, mask)
    metrics["value_clip_fraction"] = masked_mean(clipped_error > error, mask)
    return 0.5 * masked_mean(jnp.maximum(error, clipped_error), mask), jax.lax.stop_gradient(metrics)


def value_loss(values, old_values, returns, mask, kind="clipped", limit=0.2):
    """The value loss by name.

    Args: as `clipped_value_loss`, and
      kind: "clipped" as above; "squared": half the squared error; "huber": the same up to an error of `limit`, linear
        beyond (Huber 1964), so that one return far off does not decide the step.
      limit: reward units: clip_range of "clipped", the error at which "huber" turns linear; "squared" reads none.
    Raises: ValueError for another kind.
    """
    if kind == "clipped":
        return clipped_value_loss(values, old_values, returns, mask, limit)
    if kind not in VALUE_LOSSES:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(VALUE_LOSSES)}.")
    values, old_values, returns = _real_values(values, old_values, returns, mask)
    losses = optax.losses.squared_error(values, returns) / 2
    if kind == "huber":
        losses = optax.losses.huber_loss(values, returns, delta=limit)
    return masked_mean(losses, mask), jax.lax.stop_gradient(_explained(old_values, returns, mask))


VALUE_LOSSES = ("clipped", "squared", "huber")


def _real_values(values, old_values, returns, mask):
    chex.assert_rank(values, 2)
    chex.assert_equal_shape([values, old_values, returns, mask])
    real = lambda x: jnp.where(mask > 0, x.astype(jnp.float32), 0.0)
    return real(values), *jax.lax.stop_gradient((real(old_values), real(returns)))


def _explained(old_values, returns, mask):
    variance = lambda x: masked_mean(jnp.square(x - masked_mean(x, mask)), mask)
    total = variance(returns)
    left = variance(returns - old_values) / jnp.where(total > 0, total, 1.0)
    return {"explained_variance": jnp.where(total > 0, 1.0 - left, 0.0)}
