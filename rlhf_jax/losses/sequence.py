"""From the log-probabilities of tokens to one number a completion, or one weight a pair.

Knows log-probabilities and masks; nothing of the loss that reads the numbers. Sources: LD-DPO (Liu et al. 2024,
arXiv:2409.06411), WPO (Zhou et al. 2024, arXiv:2406.11827)."""

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses.masking import masked_mean


def sequence_sum(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """The log-probability of each completion.

    Args:
      logprobs: [B, T] nats. mask: [B, T], 1 where the token counts; entries elsewhere are never read, NaN included.
    Returns: [B] float32, nats; 0 for a row without a token.
    Raises: AssertionError if the shapes differ.
    """
    return _real(logprobs, mask).sum(-1)


def sequence_mean(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """The same by token: [B] float32, nats a token; 0 for a row without one. Arguments as in `sequence_sum`."""
    return masked_mean(_real(logprobs, mask), mask > 0, axis=-1)


def length_desensitised_sums(
    chosen_logprobs: jax.Array,
    chosen_mask: jax.Array,
    rejected_logprobs: jax.Array,
    rejected_mask: jax.Array,
    *,
    tail_weight: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """LD-DPO: sums over tokens in which what exceeds the length of the shorter of a pair counts for less.

    sum_{i <= l} log p_i + tail_weight * sum_{i > l} log p_i, with l the smaller number of tokens of the two; the
    modified likelihood of arXiv:2409.06411. Policy and reference take the same weights.

    Args:
      chosen_logprobs, chosen_mask: [B, T]; nats, and 1 where the token counts. Entries elsewhere are never read. The
        i-th token is the i-th that counts, wherever it stands: padding may be left, right or between.
      rejected_logprobs, rejected_mask: [B, S], the same.
      tail_weight: the paper's alpha. 1 gives the plain sums, 0 cuts both at one length.
    Returns: (chosen, rejected), [B] float32, nats. A pair with an empty side keeps nothing but tail of the other.
    Raises: AssertionError if the shapes differ.
    """
    chex.assert_equal_shape_prefix([chosen_mask, rejected_mask], 1)
    lengths = [(mask > 0).sum(-1) for mask in (chosen_mask, rejected_mask)]
    shared = jnp.minimum(*lengths)[:, None]

    def weighted(logprobs, mask):
        position = jnp.cumsum(mask > 0, axis=-1)  # 1 at the first token that counts
        tail = position > jnp.broadcast_to(shared, position.shape)
        return (_real(logprobs, mask) * jnp.where(tail, tail_weight, 1.0)).sum(-1)

    return weighted(chosen_logprobs, chosen_mask), weighted(rejected_logprobs, rejected_mask)


def wpo_weights(
    chosen_logprobs: jax.Array,
    chosen_log_collision: jax.Array,
    chosen_mask: jax.Array,
    rejected_logprobs: jax.Array,
    rejected_log_collision: jax.Array,
    rejected_mask: jax.Array,
) -> jax.Array:
    """How likely the policy would be to write a pair itself: what WPO multiplies the pair's loss by.

    exp of the mean over tokens of log p(token) - log sum_v p(v)^2, chosen times rejected (arXiv:2406.11827, eq. 2 with
    sampled alignment): a token as likely as one drawn from the policy is on average counts 1. At most 1, as in the
    authors' code; TRL 1.16 has no such bound.

    Args:
      chosen_logprobs: [B, T] nats, of the tokens under the policy.
      chosen_log_collision: [B, T] nats, log sum_v p(v)^2 of the distributions that they are drawn from.
      chosen_mask: [B, T], 1 where the token counts. Entries elsewhere are never read, NaN included.
      rejected_logprobs, rejected_log_collision, rejected_mask: [B, S], the same.
    Returns: [B] float32 in [0, 1], without gradient. A side without a token has weight 1. Not for losses that sort the
      pairs of a batch (`whole_batch` in losses/preference.py): there a loss is no pair's own.
    Raises: AssertionError if the shapes differ.
    """
    chex.assert_equal_shape([chosen_logprobs, chosen_log_collision])
    chex.assert_equal_shape([rejected_logprobs, rejected_log_collision])
    chex.assert_equal_shape_prefix([chosen_mask, rejected_mask], 1)
    aligned = lambda logprobs, collision, mask: masked_mean(
        _real(logprobs, mask) - _real(collision, mask), mask > 0, axis=-1
    )
    log_weight = aligned(chosen_logprobs, chosen_log_collision, chosen_mask) + aligned(
        rejected_logprobs, rejected_log_collision, rejected_mask
    )
    return jax.lax.stop_gradient(jnp.exp(jnp.minimum(log_weight, 0.0)))


def _real(x, mask):
    """float32, 0 outside the mask, so that no NaN there reaches a value or a gradient."""
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([x, mask])
    return jnp.where(mask > 0, jnp.asarray(x, jnp.float32), 0.0)
