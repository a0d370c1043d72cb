"""How concentrated a distribution over the vocabulary is: log sum_v p(v)^2, from hidden states by vocabulary chunk.

What WPO measures tokens against (arXiv:2406.11827): the mean likelihood of a token drawn from the distribution. Knows a
vocabulary and nothing of models or masks."""

import jax
import jax.numpy as jnp

from rlhf_jax.losses.logprobs import piece_starts, vocabulary_piece


def fused_log_collision(hidden, unembedding, *, chunk_size=8192, temperature=1.0):
    """log of the probability that two tokens drawn from a distribution are the same, without ever holding all logits.

    Args:
      hidden: [..., T, D]. unembedding: [D, V].
      chunk_size: vocabulary entries a piece; 0 or at least V: all at once.
      temperature: divides the logits.
    Returns: [..., T] float32, nats, between -log V and 0; without gradient.
    """
    hidden, unembedding = jax.lax.stop_gradient((hidden, unembedding))
    flat, V = hidden.reshape(-1, hidden.shape[-1]), unembedding.shape[-1]
    size = V if chunk_size <= 0 else min(chunk_size, V)

    def fold(carry, start):
        top, total, squares = carry
        logits, _ = vocabulary_piece(size, flat, unembedding, temperature, start)
        new_top = jnp.maximum(top, logits.max(-1))
        mass = jnp.exp(logits - new_top[:, None])  # 0 where an earlier piece had the column
        shrink = jnp.exp(top - new_top)
        return (new_top, total * shrink + mass.sum(-1), squares * shrink**2 + (mass**2).sum(-1)), None

    N = flat.shape[0]
    carry = (jnp.full(N, -jnp.inf), jnp.zeros(N), jnp.zeros(N))
    (_, total, squares), _ = jax.lax.scan(fold, carry, jnp.array(piece_starts(size, V)))
    return (jnp.log(squares) - 2.0 * jnp.log(total)).reshape(hidden.shape[:-1])
