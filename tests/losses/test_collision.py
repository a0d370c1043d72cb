"""log sum p^2 against float64, in chunks that do and do not divide the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.collision import fused_log_collision

V, D = 37, 8


def reference(hidden, unembedding, temperature):
    logits = np.float64(hidden) @ np.float64(unembedding) / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.log((p**2).sum(-1))


@pytest.mark.parametrize("chunk_size", [0, 5, 8, 36, 37, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_value(chunk_size, temperature):
    rng = np.random.default_rng(chunk_size)
    hidden, unembedding = np.float32(rng.normal(0, 1, (2, 3, D))), np.float32(rng.normal(0, 1, (D, V)))
    got = fused_log_collision(hidden, unembedding, chunk_size=chunk_size, temperature=temperature)
    np.testing.assert_allclose(got, reference(hidden, unembedding, temperature), rtol=1e-5, atol=1e-6)


def test_ends_are_certainty_and_chance():
    hidden = jnp.array([[0.0], [1e4], [-1e4]])
    got = fused_log_collision(hidden, jnp.arange(float(V))[None], chunk_size=8)
    np.testing.assert_allclose(got, [-np.log(V), 0.0, 0.0], rtol=1e-6, atol=1e-6)


def test_carries_no_gradient_and_holds_no_whole_row_of_logits():
    rng = np.random.default_rng(1)
    inputs = jnp.float32(rng.normal(size=(5, D))), jnp.float32(rng.normal(size=(D, V)))
    f = lambda hidden, unembedding: fused_log_collision(hidden, unembedding, chunk_size=8).sum()
    grads = jax.grad(f, argnums=(0, 1))(*inputs)
    assert all((g == 0).all() for g in grads)
    assert f"[5,{V}]" not in str(jax.make_jaxpr(f)(*inputs))
