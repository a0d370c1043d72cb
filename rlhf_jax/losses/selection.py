"""Which completions are trained on, from their scores: the best of a group, its extremes, quantiles of a pool.

Knows scores and which of them count; nothing of tokens. Indices carry no gradient."""

import chex
import jax
import jax.numpy as jnp


def best_of_group(scores: jax.Array, weights: jax.Array, keep: int = 1) -> tuple[jax.Array, jax.Array]:
    """The `keep` highest scores of each group, best first; of equal ones the first.

    RAFT's ranking within a prompt (Dong et al. 2023, arXiv:2304.06767, algorithm 1).
    Args:
      scores, weights: [B, G]; scores where the weight is 0 are never read. keep: at most G.
    Returns: (indices [B, keep] int32, weights [B, keep] of those, 0 where a group has fewer that count).
    Raises: AssertionError if the shapes differ.
    """
    chex.assert_rank(scores, 2)
    chex.assert_equal_shape([scores, weights])
    # A key that counts stands before any that does not, -inf among the scores or not.
    order = jnp.lexsort((jnp.where(weights > 0, -scores, 0.0), weights <= 0), axis=-1)
    indices = order[:, :keep].astype(jnp.int32)
    return indices, jnp.take_along_axis(weights, indices, axis=-1)


def best_and_worst(scores: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A pair from each group: its highest score, then its lowest.

    Args:
      scores, weights: [B, G]; scores where the weight is 0 are never read.
    Returns: (indices [B, 2] int32, weight [B] float32: 1, or 0 where no two that count differ: nothing to prefer).
    Raises: AssertionError if the shapes differ.
    """
    chex.assert_rank(scores, 2)
    chex.assert_equal_shape([scores, weights])
    best = jnp.where(weights > 0, scores, -jnp.inf)
    worst = jnp.where(weights > 0, scores, jnp.inf)
    indices = jnp.stack([best.argmax(-1), worst.argmin(-1)], axis=-1).astype(jnp.int32)
    return indices, (best.max(-1) > worst.min(-1)).astype(jnp.float32)


def quantiles(scores: jax.Array, weights: jax.Array, number: int) -> jax.Array:
    """The quantile of each score among those that count: 0 the lowest, number - 1 the highest.

    By rank, so that the quantiles differ in size by one at most; equal scores may fall into different ones (Lu et
    al. 2022, arXiv:2205.13636: sorted, then cut into equally sized parts). Of equal scores the later ranks higher.
    Args:
      scores, weights: [N]; scores where the weight is 0 are never read. number: of quantiles.
    Returns: [N] int32; 0 where the weight is 0.
    Raises: AssertionError if the shapes differ.
    """
    chex.assert_rank(scores, 1)
    chex.assert_equal_shape([scores, weights])
    counts = weights > 0
    order = jnp.lexsort((jnp.where(counts, scores, 0.0), ~counts))
    ranks = jnp.zeros(scores.shape, jnp.int32).at[order].set(jnp.arange(scores.shape[0], dtype=jnp.int32))
    found = ranks * number // jnp.maximum(counts.sum(dtype=jnp.int32), 1)
    return jnp.where(counts, found, 0)
