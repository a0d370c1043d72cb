"""KL(reference || policy) over the whole vocabulary, fused from hidden states, with its gradient in the policy.

Where an estimate from the policy's own samples would be of the other direction: this one keeps the policy wide
enough to cover whatever the reference may say. Knows a vocabulary and nothing of models or masks."""

import jax
import jax.numpy as jnp

from rlhf_jax.losses.logprobs import piece_starts, vocabulary_piece


def fused_forward_kl(ref_hidden, ref_unembedding, hidden, unembedding, *, chunk_size=8192, temperature=1.0):
    """sum_v p0(v) (log p0(v) - log p(v)) at each position, `chunk_size` vocabulary entries at a time.

    The penalty of Quark, Lu et al. 2022, arXiv:2205.13636. The backward pass computes each piece of logits again.
    Args:
      ref_hidden: [..., T, D]; ref_unembedding: [D, V]: of p0, without gradient.
      hidden: [..., T, E]; unembedding: [E, V]: of p, which carries the gradient.
      chunk_size: vocabulary entries a piece; 0 or at least V: all at once.
      temperature: divides the logits of both.
    Returns: [..., T] float32, nats.
    """
    shape, V = hidden.shape[:-1], unembedding.shape[-1]
    reference = jax.lax.stop_gradient((ref_hidden.reshape(-1, ref_hidden.shape[-1]), ref_unembedding))
    policy = (hidden.reshape(-1, hidden.shape[-1]), unembedding)
    size = V if chunk_size <= 0 else min(chunk_size, V)

    @jax.checkpoint
    def fold(carry, start):
        ref_top, ref_total, difference, top, total = carry
        ref_logits, fresh = vocabulary_piece(size, *reference, temperature, start)
        logits, _ = vocabulary_piece(size, *policy, temperature, start)
        new_ref_top = jnp.maximum(ref_top, ref_logits.max(-1))
        mass, shrink = jnp.exp(ref_logits - new_ref_top[:, None]), jnp.exp(ref_top - new_ref_top)
        # Of logits before log-probabilities: near each other their difference is small, and so is its rounding.
        apart = jnp.where(fresh, ref_logits - logits, 0.0)
        new_top = jnp.maximum(top, jax.lax.stop_gradient(logits.max(-1)))
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(-1)
        ref_total = ref_total * shrink + mass.sum(-1)
        return (new_ref_top, ref_total, difference * shrink + (mass * apart).sum(-1), new_top, total), None

    N = policy[0].shape[0]
    low, zero = jnp.full(N, -jnp.inf), jnp.zeros(N)
    carry, starts = (low, zero, zero, low, zero), piece_starts(size, V)
    if len(starts) == 1:
        carry, _ = fold(carry, 0)
    else:
        carry, _ = jax.lax.scan(fold, carry, jnp.array(starts))
    ref_top, ref_total, difference, top, total = carry
    normalisers = (ref_top - top) + jnp.log(ref_total) - jnp.log(total)
    return (difference / ref_total - normalisers).reshape(shape)
