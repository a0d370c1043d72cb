"""Cross-entropy on completions: supervised fine-tuning, and the extra term of PPO-ptx.

Knows log-probabilities and masks."""

import chex

from rlhf_jax.losses.masking import masked_mean


def completion_cross_entropy(logprobs, mask):
    """-mean over the real tokens of the batch, in nats a token.

    Args:
      logprobs: [B, T] of the target tokens. mask: [B, T], 1 on completion tokens, the end token among them.
    Returns: float32 scalar.
    """
    chex.assert_rank(mask, 2)
    return -masked_mean(logprobs, mask)
