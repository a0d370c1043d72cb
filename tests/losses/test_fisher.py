"""Exact KL and Fisher products by vocabulary chunk, against whole matrices in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.fisher import fisher_product, softmax_kl, softmax_moments

N, D, V, T = 3, 4, 11, 0.7
CHUNKS = [0, 4, 5, 11, 100]


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_moments(chunk):
    hidden, head = draw(0, N, D), draw(1, D, V)
    normaliser, centre = softmax_moments(
        jnp.float32(hidden), jnp.float32(head), chunk_size=chunk, temperature=T
    )
    z = hidden @ head / T
    np.testing.assert_allclose(normaliser, np.log(np.exp(z).sum(-1)), rtol=1e-5)
    np.testing.assert_allclose(centre, softmax(z) @ head.T, atol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-3])
def test_kl_is_exact_down_to_small_steps(chunk, size):
    """At 1e-3 the KL is near 1e-6, of logits near 30: a difference of log-probabilities has no digit left."""
    old, head = draw(0, N, D).astype(np.float32), draw(1, D, V).astype(np.float32)
    old[:, 0] += 10.0
    new = old + np.float32(size) * draw(2, N, D).astype(np.float32)
    p, q = (softmax(x.astype(np.float64) @ head.astype(np.float64) / T) for x in (old, new))
    expected = (p * np.log(p / q)).sum(-1)
    normaliser, _ = softmax_moments(jnp.asarray(old), jnp.asarray(head), chunk_size=chunk, temperature=T)
    found = softmax_kl(old, head, normaliser, new, head, chunk_size=chunk, temperature=T)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=3e-7 + 1e-5 * size)
    np.testing.assert_allclose(
        softmax_kl(old, head, normaliser, old, head, chunk_size=chunk, temperature=T), 0, atol=1e-6
    )


def test_kl_of_a_step_that_leaves_everything_is_never_small():
    """Where the new policy gives all that was likely nothing, or logits overflow: large, infinite or NaN, not 0."""
    old, head = jnp.zeros((1, 2)), jnp.array([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
    normaliser, _ = softmax_moments(old, head)
    for far in ([300.0, 0.0], [0.0, 1e4], [np.inf, 0.0], [np.nan, 0.0]):
        kl = float(softmax_kl(old, head, normaliser, jnp.array([far]), head)[0])
        assert not kl < 90, (far, kl)
    # A shift of all logits is no step at all.
    ones = jnp.ones((2, 3))
    normaliser, _ = softmax_moments(old, ones)
    assert float(softmax_kl(old, ones, normaliser, old - 500.0, ones)[0]) < 1e-4


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("trained", [False, True], ids=["states", "states-and-unembedding"])
def test_product_is_the_explicit_matrix(chunk, trained):
    """sum_n w_n J^T (diag p - p p^T) J v, J written out, for what makes the logits."""
    hidden, head, weights = draw(0, N, D), draw(1, D, V), np.array([0.5, 0.0, 0.25])
    v, v_head = draw(2, N, D), draw(3, D, V) * trained
    d_hidden, d_head = np.zeros((N, D)), np.zeros((D, V))
    for n in range(N):
        p = softmax(hidden[n] @ head / T)
        pulled = weights[n] * (np.diag(p) - np.outer(p, p)) @ ((v[n] @ head + hidden[n] @ v_head) / T) / T
        d_hidden[n], d_head = head @ pulled, d_head + np.outer(hidden[n], pulled)
    single = lambda *arrays: [jnp.asarray(x, jnp.float32) for x in arrays]
    hidden, head, v, v_head, weights = single(hidden, head, v, v_head, weights)
    options = dict(chunk_size=chunk, temperature=T)
    moments = softmax_moments(hidden, head, **options)
    found = fisher_product(
        hidden, head, moments, v, weights, unembedding_tangent=v_head if trained else None, **options
    )
    np.testing.assert_allclose(found[0], d_hidden, atol=1e-5)
    if trained:
        np.testing.assert_allclose(found[1], d_head, atol=1e-5)
    else:
        assert found[1] is None
