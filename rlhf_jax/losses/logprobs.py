"""Log-probabilities and entropy of tokens: from logits, or fused from hidden states without ever holding all logits.

Knows a vocabulary and nothing of models or masks. Positions are the caller's: states[t] predicts token_ids[t]."""

import functools

import jax
import jax.numpy as jnp


def token_logprobs(logits, token_ids, temperature=1.0):
    """log softmax(logits / temperature) at the given tokens.

    Args:
      logits: [..., T, V]; logits[t] predicts token_ids[t]. Computed in float32.
      token_ids: [..., T] int.
    Returns: [..., T] float32, nats.
    """
    scaled = logits.astype(jnp.float32) / temperature
    chosen = jnp.take_along_axis(scaled, token_ids[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def fused_token_logprobs(hidden, unembedding, token_ids, *, chunk_size=8192, temperature=1.0):
    """The same from hidden states, `chunk_size` vocabulary entries at a time, with the entropy of each distribution.

    The backward pass computes each piece of logits again instead of keeping it. Where the unembedding carries no
    gradient, none is computed for it.

    Args:
      hidden: [..., T, D]. unembedding: [D, V]. token_ids: [..., T] int.
      chunk_size: vocabulary entries a piece; 0 or at least V: all at once.
      temperature: divides the logits.
    Returns: (logprobs [..., T], entropy [..., T]) float32, nats.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    V = unembedding.shape[-1]
    size = V if chunk_size <= 0 else -(-V // -(-V // min(chunk_size, V)))  # pieces of about the same size
    logprobs, entropy = _fused(
        size, flat, unembedding, token_ids.reshape(-1), jnp.asarray(temperature, jnp.float32)
    )
    return logprobs.reshape(token_ids.shape), entropy.reshape(token_ids.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(size, hidden, unembedding, token_ids, temperature):
    return _forward(size, hidden, unembedding, token_ids, temperature)[:2]


def _forward(size, hidden, unembedding, token_ids, temperature, with_slope=False):
    """Running maximum, sum of exponentials and its mean logit over the pieces (Milakov & Gimelshein 2018).

    Returns: (logprobs, entropy, normaliser [N]; slope [N, D] of logprobs by hidden, times the temperature, or None).
    """
    N, D = hidden.shape

    def fold(carry, start):
        top, total, weighted, chosen, read = carry
        logits, fresh = vocabulary_piece(size, hidden, unembedding, temperature, start)
        new_top = jnp.maximum(top, logits.max(-1))
        mass = jnp.exp(logits - new_top[:, None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + mass.sum(-1)
        # fresh columns have finite logits; an overlapped one has mass 0 and must not make 0 * -inf.
        weighted = weighted * shrink + jnp.where(fresh, mass * logits, 0.0).sum(-1)
        local = token_ids - start
        inside = (local >= 0) & (local < size)
        found = jnp.take_along_axis(logits, jnp.clip(local, 0, size - 1)[:, None], axis=-1)[:, 0]
        chosen = jnp.where(inside & jnp.isfinite(found), found, chosen)
        if with_slope:
            columns = jax.lax.dynamic_slice_in_dim(unembedding, start, size, axis=1).astype(hidden.dtype)
            more = jnp.dot(mass.astype(hidden.dtype), columns.T, preferred_element_type=jnp.float32)
            read = read * shrink[:, None] + more
        return (new_top, total, weighted, chosen, read), None

    carry = (jnp.full(N, -jnp.inf), jnp.zeros(N), jnp.zeros(N), jnp.zeros(N))
    carry += (jnp.zeros((N, D)) if with_slope else None,)
    starts = piece_starts(size, unembedding.shape[-1])
    if len(starts) == 1:
        carry, _ = fold(carry, 0)
    else:
        carry, _ = jax.lax.scan(fold, carry, jnp.array(starts))
    top, total, weighted, chosen, read = carry
    normaliser, slope = top + jnp.log(total), None
    if with_slope:
        slope = jnp.take(unembedding, token_ids, axis=1).T.astype(jnp.float32) - read / total[:, None]
    return chosen - normaliser, normaliser - weighted / total, normaliser, slope


def piece_starts(size, V):
    """First column of each piece. The last piece is moved back to end at V, and counts only what is new in it."""
    return [min(start, V - size) for start in range(0, V, size)]


def vocabulary_piece(size, hidden, unembedding, temperature, start):
    """(logits [N, size] float32 of the columns from `start`, -inf where an earlier piece had them; which are new)."""
    columns = jax.lax.dynamic_slice_in_dim(unembedding, start, size, axis=1).astype(hidden.dtype)
    logits = jnp.dot(hidden, columns, preferred_element_type=jnp.float32) / temperature
    if unembedding.shape[-1] % size == 0:  # said so that the compiler knows it and leaves out what it is for
        fresh = jnp.ones((1, size), bool)
    else:  # only the last piece can overlap, and it starts past a multiple of size by what it was moved
        fresh = (start + jnp.arange(size) >= -(-start // size) * size)[None]
    return jnp.where(fresh, logits, -jnp.inf), fresh


def join_pieces(pieces, starts, unembedding):
    """The gradient of the whole [D, V] from those of its pieces [pieces, D, size]; zeros where there are none."""
    if pieces is None:
        return jnp.zeros_like(unembedding)
    D, V = unembedding.shape
    size = pieces.shape[-1]
    last = V - starts[-1] - (V - size * (len(starts) - 1))  # columns of the last piece that were not new
    whole = pieces[:-1].swapaxes(0, 1).reshape(D, -1)
    return jnp.concatenate([whole, pieces[-1][:, last:]], axis=1).astype(unembedding.dtype)


def _fused_forward(size, hidden, unembedding, token_ids, temperature):
    """In pieces, and with a head that is not trained, the gradient of logprobs is made here, of the logits that are at
    hand: the backward pass would compute them again."""
    head_is_trained = unembedding.perturbed
    values = [x.value for x in (hidden, unembedding, token_ids, temperature)]
    with_slope = hidden.perturbed and not head_is_trained and size < values[1].shape[1]
    logprobs, entropy, normaliser, slope = _forward(size, *values, with_slope)
    # Whether to compute the head's gradient is known while tracing; residuals hold arrays, so it travels as structure.
    told = (logprobs, entropy, normaliser, slope)
    return (logprobs, entropy), (*values, *told, () if head_is_trained else None)


def _fused_backward(size, saved, cotangents):
    hidden, unembedding, token_ids, temperature, logprobs, entropy, normaliser, slope, head_is_trained = saved
    zero = jax.custom_derivatives.SymbolicZero
    N, V = hidden.shape[0], unembedding.shape[-1]
    of_logprob, of_entropy = (jnp.zeros(N) if isinstance(g, zero) else g for g in cotangents)
    entropy_matters = not isinstance(cotangents[1], zero)
    if slope is not None and not entropy_matters:
        d_temperature = (
            -(of_logprob * (logprobs + entropy)).sum() / temperature
        )  # the chosen logit less the mean one
        d_hidden = of_logprob[:, None] * slope / temperature
        return d_hidden.astype(hidden.dtype), jnp.zeros_like(unembedding), None, d_temperature

    def add(carry, start):
        d_hidden, d_temperature = carry
        logits, fresh = vocabulary_piece(size, hidden, unembedding, temperature, start)
        logp = logits - normaliser[:, None]
        p = jnp.exp(logp)
        picked = (start + jnp.arange(size))[None] == token_ids[:, None]
        d_logits = of_logprob[:, None] * ((picked & fresh) - p)
        if entropy_matters:  # dH/dz = -p (log p + H)
            d_logits -= of_entropy[:, None] * jnp.where(fresh, p * (logp + entropy[:, None]), 0.0)
        d_temperature -= jnp.where(fresh, d_logits * logits, 0.0).sum() / temperature
        d_logits = (d_logits / temperature).astype(hidden.dtype)
        columns = jax.lax.dynamic_slice_in_dim(unembedding, start, size, axis=1).astype(hidden.dtype)
        d_hidden += jnp.dot(d_logits, columns.T, preferred_element_type=jnp.float32)
        d_columns = None
        if head_is_trained is not None:
            d_columns = jnp.dot(hidden.T, d_logits, preferred_element_type=jnp.float32)
        return (d_hidden, d_temperature), d_columns

    carry = (jnp.zeros(hidden.shape, jnp.float32), jnp.float32(0.0))
    starts = piece_starts(size, V)
    if len(starts) == 1:
        carry, pieces = add(carry, 0)
        pieces = None if pieces is None else pieces[None]
    else:
        carry, pieces = jax.lax.scan(add, carry, jnp.array(starts))
    d_unembedding = join_pieces(pieces, starts, unembedding)
    return carry[0].astype(hidden.dtype), d_unembedding, None, carry[1]


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)
