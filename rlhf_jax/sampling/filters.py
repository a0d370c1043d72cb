"""From logits to one token a row: what may be sampled, and the draw itself.

Rows are independent: a row's token depends on its own logits and key alone."""

import math

import jax
import jax.numpy as jnp

NEVER = -jnp.inf
CHUNK = 256  # vocabulary entries a leaf of the two-level draw


def restrict(logits, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
    """[N, V] logits, at the sampling temperature, with what may not be sampled at -inf.

    top_k: keep the k largest (0: all). top_p: of those, the smallest set of at least this probability (1: all).
    min_p: keep what has at least this fraction of the largest probability (0: all; Nguyen et al. 2024,
    arXiv:2407.01082). The most probable token always stays. Ties with the last one kept stay too.
    """
    if top_k and top_k < logits.shape[-1]:
        kept = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kept, NEVER, logits)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        share = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(share, axis=-1) - share < top_p  # the mass before this token
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, NEVER, logits)
    if min_p > 0.0:
        largest = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits < largest + math.log(min_p), NEVER, logits)
    return logits


def penalise(logits, seen, penalty: float):
    """[N, V] logits, before the temperature, with those of tokens `seen` [N, V] over the penalty, or times it where
    they are negative: below as they were, if the penalty is above 1. Keskar et al. 2019, arXiv:1909.05858, with the
    sign rule of transformers."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def within(logits, vocab_size: int | None):
    """[N, V] with the columns from `vocab_size` on, which pad the embedding, at -inf.

    Of what is chosen alone, as all filters: trainer and reference normalise over every column.
    """
    if vocab_size is None or vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where((jnp.arange(logits.shape[-1]) >= vocab_size)[None], NEVER, logits)


def forbid(logits, token_ids: tuple[int, ...], when):
    """[N, V] with the columns of `token_ids` at -inf where `when` (a scalar, or [N, 1]) holds."""
    if not token_ids:
        return logits
    blocked = jnp.zeros(logits.shape[-1], bool).at[jnp.array(token_ids)].set(True)
    return jnp.where(blocked[None] & when, NEVER, logits)


def draw(logits, keys):
    """One categorical draw a row: token ids [N] int32 from [N, V] logits and [N] keys.

    By inverse distribution in two levels (first a block of the vocabulary, then a token in it): two uniform numbers
    a row where the Gumbel trick needs V, and partial sums short enough for float32.
    """
    N, V = logits.shape
    mass = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    blocks = -(-V // CHUNK)
    mass = jnp.pad(mass, ((0, 0), (0, blocks * CHUNK - V))).reshape(N, blocks, CHUNK)
    u = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _first_above(mass.sum(-1), u[:, 0])
    inside = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
    return block * CHUNK + _first_above(inside, u[:, 1])


def _first_above(mass, u):
    """Index of the first entry whose cumulative mass exceeds u of the total; entries of mass 0 are never chosen."""
    below = jnp.cumsum(mass, axis=-1)
    # u <= 1 - 2**-23, so u * total is below the total in float32 and some entry always exceeds it.
    return jnp.argmax(below > u[:, None] * below[:, -1:], axis=-1).astype(jnp.int32)
