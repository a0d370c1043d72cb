"""The Fisher information of softmax outputs and the exact KL it is the curvature of, by vocabulary chunk.

Knows hidden states and an unembedding; nothing of models, adapters or masks. Logits are z = hidden @ unembedding /
temperature and p their softmax; at equal distributions the Hessian of KL(old || new) in z is diag(p) - p p^T (Amari
1998; Martens 2014, arXiv:1412.1193), so with J = dz/dparams the Fisher matrix of the parameters is the mean of
J^T (diag(p) - p p^T) J. It is taken over every token of the vocabulary, not over the tokens that were drawn."""

import jax
import jax.numpy as jnp

from rlhf_jax.losses.logprobs import join_pieces, piece_starts, vocabulary_piece


def softmax_moments(hidden, unembedding, *, chunk_size=8192, temperature=1.0):
    """What the two functions below read of a distribution again and again.

    Args:
      hidden: [..., D]. unembedding: [D, V]. chunk_size: vocabulary entries a piece; 0 or at least V: all at once.
    Returns: (log normaliser [...] nats, mean column of the unembedding E_p[column] [..., D]) float32.
    """
    flat, size, starts = _cut(hidden, unembedding, chunk_size)

    def fold(carry, start):
        top, total, column = carry
        logits, _ = vocabulary_piece(size, flat, unembedding, temperature, start)
        new_top = jnp.maximum(top, logits.max(-1))
        mass, shrink = jnp.exp(logits - new_top[:, None]), jnp.exp(top - new_top)
        column = column * shrink[:, None] + _back(mass, unembedding, start, size, flat.dtype)
        return (new_top, total * shrink + mass.sum(-1), column), None

    N = flat.shape[0]
    carry = (jnp.full(N, -jnp.inf), jnp.zeros(N), jnp.zeros(flat.shape, jnp.float32))
    (top, total, column), _ = _fold(fold, carry, starts)
    normaliser = top + jnp.log(total)
    return normaliser.reshape(hidden.shape[:-1]), (column / total[:, None]).reshape(hidden.shape)


def softmax_kl(
    old_hidden, old_unembedding, old_normaliser, hidden, unembedding, *, chunk_size=8192, temperature=1.0
):
    """KL(old || new) of each position, exact over the vocabulary.

    With x = z_new - z_old it is log E_old[exp x] - E_old[x]: two numbers of the size of x, so a small KL is not the
    difference of two large ones.

    Args:
      old_hidden, hidden: [..., D]. old_unembedding, unembedding: [D, V]; may be one array.
      old_normaliser: [...] nats, of `softmax_moments`.
    Returns: [...] float32, nats, at least 0. For measuring: the curvature at old is `fisher_product`.
    """
    old, size, starts = _cut(old_hidden, old_unembedding, chunk_size)
    new, shift = hidden.reshape(old.shape), old_normaliser.reshape(-1, 1)

    def fold(carry, start):
        mass, moved, top, total = carry
        z_old, fresh = vocabulary_piece(size, old, old_unembedding, temperature, start)
        z_new, _ = vocabulary_piece(size, new, unembedding, temperature, start)
        p = jnp.exp(z_old - shift)
        moved = moved + (p * jnp.where(fresh, z_new - z_old, 0.0)).sum(-1)
        # The new logits less the old normaliser: near log p, so that nothing of the sum's digits is lost to a shift.
        shifted = z_new - shift
        new_top = jnp.maximum(top, shifted.max(-1))
        total = total * jnp.exp(top - new_top) + jnp.exp(shifted - new_top[:, None]).sum(-1)
        return (mass + p.sum(-1), moved, new_top, total), None

    zeros = jnp.zeros(old.shape[0])
    (mass, moved, top, total), _ = _fold(fold, (zeros, zeros, zeros - jnp.inf, zeros), starts)
    # `mass` is 1 but for the rounding of the normaliser, which cancels here.
    kl = top + jnp.log(total) - jnp.log(mass) - moved / mass
    return jnp.maximum(kl, 0.0).reshape(old_normaliser.shape)


def fisher_product(
    hidden,
    unembedding,
    moments,
    tangent,
    weights,
    *,
    unembedding_tangent=None,
    chunk_size=8192,
    temperature=1.0,
):
    """The weighted sum of (diag(p) - p p^T) in logits, applied to a tangent of what makes the logits.

    Args:
      hidden: [..., D] and unembedding: [D, V], where p is. moments: those of `softmax_moments`.
      tangent: [..., D], of hidden. unembedding_tangent: [D, V], or None where the unembedding is not trained.
      weights: [...], of the positions. With 1 / tokens it is the Fisher matrix of the mean over tokens.
    Returns: (cotangent of hidden [..., D], cotangent of the unembedding [D, V] or None), in the dtypes of the tangents.
    """
    flat, size, starts = _cut(hidden, unembedding, chunk_size)
    d_flat = tangent.reshape(flat.shape)
    normaliser, centre = (m.reshape(flat.shape[0], -1) for m in moments)
    weight = weights.reshape(-1, 1) / temperature

    def push(start):
        """(p, change of the logits) of a piece; both 0 in columns that an earlier piece had."""
        logits, fresh = vocabulary_piece(size, flat, unembedding, temperature, start)
        change = _columns_product(d_flat, unembedding, start, size)
        if unembedding_tangent is not None:
            change += _columns_product(flat, unembedding_tangent, start, size)
        return jnp.exp(logits - normaliser), jnp.where(fresh, change / temperature, 0.0)

    def fold(carry, start):
        mean, back = carry
        p, change = push(start)
        back += _back(p * change, unembedding, start, size, flat.dtype)
        return (mean + (p * change).sum(-1, keepdims=True), back), None

    carry = (jnp.zeros((flat.shape[0], 1)), jnp.zeros(flat.shape, jnp.float32))
    (mean, back), _ = _fold(fold, carry, starts)
    d_hidden = (weight * (back - mean * centre)).reshape(tangent.shape).astype(tangent.dtype)
    if unembedding_tangent is None:
        return d_hidden, None

    def piece(carry, start):
        p, change = push(start)
        pulled = (weight * p * (change - mean)).astype(flat.dtype)
        return carry, jnp.dot(flat.T, pulled, preferred_element_type=jnp.float32)

    _, pieces = _fold(piece, None, starts)
    return d_hidden, join_pieces(pieces, starts, unembedding_tangent)


def _cut(hidden, unembedding, chunk_size):
    """(hidden [N, D], vocabulary entries a piece, first column of each piece)."""
    V = unembedding.shape[-1]
    size = V if chunk_size <= 0 else min(chunk_size, V)
    return hidden.reshape(-1, hidden.shape[-1]), size, piece_starts(size, V)


def _fold(step, carry, starts):
    """lax.scan over the pieces, without a loop where there is one."""
    if len(starts) > 1:
        return jax.lax.scan(step, carry, jnp.array(starts))
    carry, out = step(carry, 0)
    return carry, None if out is None else out[None]


def _columns(unembedding, start, size, dtype):
    return jax.lax.dynamic_slice_in_dim(unembedding, start, size, axis=1).astype(dtype)


def _columns_product(x, unembedding, start, size):
    return jnp.dot(x, _columns(unembedding, start, size, x.dtype), preferred_element_type=jnp.float32)


def _back(x, unembedding, start, size, dtype):
    """x [N, size] times the transposed columns: [N, D]."""
    columns = _columns(unembedding, start, size, dtype)
    return jnp.dot(x.astype(dtype), columns.T, preferred_element_type=jnp.float32)
