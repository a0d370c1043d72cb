"""The exact KL(policy || reference) over the whole vocabulary, from hidden states, without ever holding all logits.

Knows two hidden states and what reads them; nothing of models or masks. It has no noise from the token that happened
to be drawn, for the price of a second pass over the vocabulary (Amini et al. 2025, arXiv:2504.10637)."""

import functools

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.losses.logprobs import join_pieces, piece_starts, vocabulary_piece


def fused_kl(hidden_p, unembedding_p, hidden_q, unembedding_q, *, chunk_size=8192, temperature=1.0):
    """sum_v p_v log(p_v / q_v), p and q the softmax of hidden @ unembedding / temperature, a piece at a time.

    Only p carries gradient: the reference q and the temperature have none. The backward pass computes each piece of
    logits again. Where unembedding_p carries no gradient, none is computed for it. A row whose cotangent is 0 is not
    read by the backward pass, NaN included.

    Args:
      hidden_p, hidden_q: [..., D], of one shape. unembedding_p, unembedding_q: [D, V].
      chunk_size: vocabulary entries a piece; 0 or at least V: all at once.
    Returns: [...] float32, nats; never below 0, and 0 where p and q are the same.
    Raises: AssertionError if the shapes differ.
    """
    chex.assert_equal_shape([hidden_p, hidden_q])
    chex.assert_equal_shape([unembedding_p, unembedding_q])
    D, V = unembedding_p.shape
    size = V if chunk_size <= 0 else min(chunk_size, V)
    flat = [x.reshape(-1, D) for x in (hidden_p, jax.lax.stop_gradient(hidden_q))]
    reference = jax.lax.stop_gradient(unembedding_q)
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    return _fused(size, flat[0], unembedding_p, flat[1], reference, temperature).reshape(hidden_p.shape[:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(size, hidden_p, unembedding_p, hidden_q, unembedding_q, temperature):
    return _forward(size, hidden_p, unembedding_p, hidden_q, unembedding_q, temperature)[0]


def _forward(size, hidden_p, unembedding_p, hidden_q, unembedding_q, temperature):
    """(KL [N], normaliser of p [N], of q [N]): running maxima and sums, as in fused_token_logprobs."""
    N = hidden_p.shape[0]

    def fold(carry, start):
        (top_p, total_p, gap), (top_q, total_q) = carry
        z_p, fresh = vocabulary_piece(size, hidden_p, unembedding_p, temperature, start)
        z_q, _ = vocabulary_piece(size, hidden_q, unembedding_q, temperature, start)
        new_p, new_q = jnp.maximum(top_p, z_p.max(-1)), jnp.maximum(top_q, z_q.max(-1))
        mass, shrink = jnp.exp(z_p - new_p[:, None]), jnp.exp(top_p - new_p)
        # Columns that an earlier piece had are -inf in both: no mass, and no -inf - -inf.
        gap = gap * shrink + (mass * jnp.where(fresh, z_p - z_q, 0.0)).sum(-1)
        total_q = total_q * jnp.exp(top_q - new_q) + jnp.exp(z_q - new_q[:, None]).sum(-1)
        return ((new_p, total_p * shrink + mass.sum(-1), gap), (new_q, total_q)), None

    lowest, zero = jnp.full(N, -jnp.inf), jnp.zeros(N)
    carry = ((lowest, zero, zero), (lowest, zero))
    starts = piece_starts(size, unembedding_p.shape[-1])
    if len(starts) == 1:
        carry, _ = fold(carry, 0)
    else:
        carry, _ = jax.lax.scan(fold, carry, jnp.array(starts))
    (top_p, total_p, gap), (top_q, total_q) = carry
    normaliser_p, normaliser_q = top_p + jnp.log(total_p), top_q + jnp.log(total_q)
    # Below 0 it is rounding.
    return jnp.maximum(gap / total_p - (normaliser_p - normaliser_q), 0.0), normaliser_p, normaliser_q


def _fused_forward(size, hidden_p, unembedding_p, hidden_q, unembedding_q, temperature):
    head_is_trained = unembedding_p.perturbed
    values = [x.value for x in (hidden_p, unembedding_p, hidden_q, unembedding_q, temperature)]
    kl, *normalisers = _forward(size, *values)
    # What is known while tracing travels as structure: residuals hold arrays.
    return kl, (*values, kl, *normalisers, () if head_is_trained else None)


def _fused_backward(size, saved, cotangent):
    hidden_p, unembedding_p, hidden_q, unembedding_q, temperature, *rows, head_is_trained = saved
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return (None,) * 5
    # A row that does not count becomes zeros here, or its NaN would reach the head's gradient as 0 * NaN.
    counts = cotangent != 0
    hidden_p, hidden_q = (jnp.where(counts[:, None], x, jnp.zeros_like(x)) for x in (hidden_p, hidden_q))
    kl, normaliser_p, normaliser_q = (jnp.where(counts, x, 0.0)[:, None] for x in rows)

    def add(d_hidden, start):
        z_p, fresh = vocabulary_piece(size, hidden_p, unembedding_p, temperature, start)
        z_q, _ = vocabulary_piece(size, hidden_q, unembedding_q, temperature, start)
        log_p = jnp.where(fresh, z_p - normaliser_p, 0.0)
        log_q = jnp.where(fresh, z_q - normaliser_q, 0.0)
        # d KL / dz = p (log p/q - KL).
        slope = jnp.where(fresh, jnp.exp(log_p) * (log_p - log_q - kl), 0.0)
        d_logits = (cotangent[:, None] * slope / temperature).astype(hidden_p.dtype)
        columns = jax.lax.dynamic_slice_in_dim(unembedding_p, start, size, axis=1).astype(hidden_p.dtype)
        d_hidden += jnp.dot(d_logits, columns.T, preferred_element_type=jnp.float32)
        d_columns = None
        if head_is_trained is not None:
            d_columns = jnp.dot(hidden_p.T, d_logits, preferred_element_type=jnp.float32)
        return d_hidden, d_columns

    d_hidden = jnp.zeros(hidden_p.shape, jnp.float32)
    starts = piece_starts(size, unembedding_p.shape[-1])
    if len(starts) == 1:
        d_hidden, pieces = add(d_hidden, 0)
        pieces = None if pieces is None else pieces[None]
    else:
        d_hidden, pieces = jax.lax.scan(add, d_hidden, jnp.array(starts))
    d_unembedding = join_pieces(pieces, starts, unembedding_p)
    return d_hidden.astype(hidden_p.dtype), d_unembedding, None, None, None


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)
