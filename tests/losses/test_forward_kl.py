"""KL(reference || policy) over the vocabulary, against float64: values, gradients, and that pieces change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.forward_kl import fused_forward_kl

N, D, E, V = 3, 4, 5, 11


def made(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return [scale * rng.normal(size=shape) for shape in ((N, D), (D, V), (N, E), (E, V))]


def by_hand(ref_hidden, ref_unembedding, hidden, unembedding, temperature=1.0):
    """[N] in float64, from whole logits."""

    def log_softmax(z):
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    p0 = log_softmax(ref_hidden @ ref_unembedding / temperature)
    return (np.exp(p0) * (p0 - log_softmax(hidden @ unembedding / temperature))).sum(-1)


@pytest.mark.parametrize("chunk_size", [0, 4])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.7, 3.0)])
def test_values_and_gradients(slope_of, chunk_size, temperature, scale):
    arrays, weights = made(0, scale), np.array([0.5, -1.0, 2.0])
    f = lambda *x: fused_forward_kl(*x, chunk_size=chunk_size, temperature=temperature)
    np.testing.assert_allclose(f(*map(jnp.float32, arrays)), by_hand(*arrays, temperature), rtol=2e-5)
    grads = jax.grad(lambda *x: (weights * f(*x)).sum(), argnums=(0, 1, 2, 3))(*map(jnp.float32, arrays))
    assert not np.any(grads[0]) and not np.any(grads[1])  # the reference is given
    for i in (2, 3):
        total = lambda x, i=i: (weights * by_hand(*arrays[:i], x, *arrays[i + 1 :], temperature)).sum()
        np.testing.assert_allclose(grads[i], slope_of(total, arrays[i]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_0_at_the_reference_and_nowhere_below(seed):
    ref_hidden, vocabulary, *_ = map(jnp.float32, made(seed, 5.0))
    at = lambda x: fused_forward_kl(ref_hidden, vocabulary, x, vocabulary, chunk_size=4)
    value, grad = jax.value_and_grad(lambda x: at(x).sum())(ref_hidden)
    assert abs(value) < 1e-5 and np.abs(grad).max() < 1e-5
    assert (at(ref_hidden + jax.random.normal(jax.random.key(seed), ref_hidden.shape)) > -1e-6).all()


def test_leading_axes_and_large_logits():
    arrays = [jnp.float32(x) for x in made(1, 30.0)]
    flat = fused_forward_kl(*arrays, chunk_size=4)
    np.testing.assert_allclose(flat, by_hand(*made(1, 30.0)), rtol=1e-4)
    arrays[0], arrays[2] = arrays[0][:, None], arrays[2][:, None]
    np.testing.assert_array_equal(fused_forward_kl(*arrays, chunk_size=4), flat[:, None])
