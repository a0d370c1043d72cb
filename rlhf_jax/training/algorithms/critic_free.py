"""What rows without a value role share: the policy's side of an objective, and where advantages are put."""

import jax.numpy as jnp

from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.training.algorithms.shared import sequences, token_mask, with_entropy


def policy(network, trained, frozen, batch):
    """(logprobs, those of the sampler, mask, entropy), [N, R] each."""
    return policy_and_states(network, trained, frozen, batch)[:-1]


def policy_and_states(network, trained, frozen, batch):
    logprobs, entropy, states = network.logprobs(frozen["base"], trained["policy"], batch)
    return sequences(logprobs), sequences(batch.old_logprobs), token_mask(batch), sequences(entropy), states


def finished(settings, loss, metrics, entropy, mask, num_sequences=None):
    """(loss with the entropy bonus, (weight, metrics)). num_sequences: that the loss is a mean over; None: tokens."""
    if num_sequences is None:
        weight, mean_entropy = mask.sum(), masked_mean(entropy, mask)
    else:
        weight = num_sequences
        mean_entropy = masked_mean(entropy, mask, axis=-1).sum() / jnp.maximum(weight, 1)
    metrics = metrics | {"policy_loss": loss, "entropy": mean_entropy}
    # Before the first update the policy is the one that sampled: this is 0 but for rounding, or something is wrong.
    metrics["first_ratio_gap"] = metrics.pop("ratio_max_gap")
    return with_entropy(settings, loss, mean_entropy), (weight, metrics)


def with_advantages(batch, advantages):
    """advantages: [N, R], or [B, G], the same at every token."""
    shape = batch.completion_mask.shape
    if advantages.shape == shape[:2]:
        advantages = jnp.broadcast_to(advantages[..., None], shape)
    return batch.replace(advantages=advantages.reshape(shape))
