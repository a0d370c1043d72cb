"""Log-probabilities and entropy against float64, plain and fused, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.logprobs import fused_token_logprobs, token_logprobs

V, D = 37, 5
CHUNKS = (0, 1, 7, 16, 36, 37, 1000)  # all at once, none that divides, one that leaves a single column


def reference(logits, ids, temperature=1.0):
    z = np.float64(logits) / temperature
    logp = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    entropy = -(np.exp(logp) * logp).sum(-1)
    return np.take_along_axis(logp, np.asarray(ids)[..., None], -1)[..., 0], entropy


def case(seed, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (2, 4, D)) * scale
    return hidden, jax.random.normal(keys[1], (D, V)), jax.random.randint(keys[2], (2, 4), 0, V)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_from_logits(temperature, scale):
    logits = jax.random.normal(jax.random.key(0), (2, 3, V)) * scale
    ids = jax.random.randint(jax.random.key(1), (2, 3), 0, V)
    expected, _ = reference(logits, ids, temperature)
    np.testing.assert_allclose(token_logprobs(logits, ids, temperature), expected, rtol=1e-5, atol=1e-6)
    grad = jax.grad(lambda z: token_logprobs(z, ids, temperature).sum())(logits)
    z = np.float64(logits) / temperature
    p = np.exp(z - np.logaddexp.reduce(z, axis=-1, keepdims=True))
    np.testing.assert_allclose(grad, (np.eye(V)[np.asarray(ids)] - p) / temperature, atol=1e-5)


def test_bfloat16_logits_are_reduced_in_float32():
    logits = jnp.zeros((1, 4096), jnp.bfloat16)
    np.testing.assert_allclose(token_logprobs(logits, jnp.array([3])), -np.log(4096), rtol=1e-6)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_values(chunk_size, temperature):
    hidden, head, ids = case(0)
    got = fused_token_logprobs(hidden, head, ids, chunk_size=chunk_size, temperature=temperature)
    expected = reference(np.float64(hidden) @ np.float64(head), ids, temperature)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_fused_gradients_of_every_input(chunk_size):
    """Against automatic differentiation of the plain form, which the tests above hold to float64."""
    hidden, head, ids = case(1)
    weights = jax.random.normal(jax.random.key(9), (2, 2, 4))

    def plain(hidden, head, temperature):
        logits = jnp.einsum("btd,dv->btv", hidden, head)
        logp = jax.nn.log_softmax(logits / temperature)
        chosen = jnp.take_along_axis(logp, ids[..., None], -1)[..., 0]
        return (weights[0] * chosen).sum() - (weights[1] * (jnp.exp(logp) * logp).sum(-1)).sum()

    def fused(hidden, head, temperature):
        logp, entropy = fused_token_logprobs(
            hidden, head, ids, chunk_size=chunk_size, temperature=temperature
        )
        return (weights[0] * logp).sum() + (weights[1] * entropy).sum()

    expected = jax.grad(plain, (0, 1, 2))(hidden, head, 0.7)
    for got, other in zip(jax.grad(fused, (0, 1, 2))(hidden, head, 0.7), expected, strict=True):
        np.testing.assert_allclose(got, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [0, 16])
def test_huge_logits_stay_finite(chunk_size):
    hidden, head, ids = case(2, scale=1e4)
    loss = lambda h: sum(x.sum() for x in fused_token_logprobs(h, head, ids, chunk_size=chunk_size))
    got = fused_token_logprobs(hidden, head, ids, chunk_size=chunk_size)
    expected = reference(np.float64(hidden) @ np.float64(head), ids)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-2)
    assert np.isfinite(jax.grad(loss)(hidden)).all()


def analytic_gradients(hidden, head, ids, of_logprob, of_entropy, temperature):
    """Float64, by hand: d logp_i / dz = onehot_i - p, dH / dz = -p (log p + H), and z = hidden @ head / temperature."""
    hidden, head = np.float64(hidden), np.float64(head)
    z = hidden @ head / temperature
    logp = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    p = np.exp(logp)
    entropy = -(p * logp).sum(-1, keepdims=True)
    d_z = np.float64(of_logprob)[..., None] * (np.eye(head.shape[1])[np.asarray(ids)] - p)
    d_z -= np.float64(of_entropy)[..., None] * p * (logp + entropy)
    d_temperature = -(d_z * z).sum() / temperature
    return d_z @ head.T / temperature, np.einsum("btd,btv->dv", hidden, d_z) / temperature, d_temperature


@pytest.mark.parametrize("chunk_size", [0, 5, 36])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_fused_gradients_against_float64(chunk_size, temperature):
    hidden, head, ids = case(5)
    weights = jax.random.normal(jax.random.key(6), (2, 2, 4))

    def loss(hidden, head, temperature):
        logp, entropy = fused_token_logprobs(
            hidden, head, ids, chunk_size=chunk_size, temperature=temperature
        )
        return (weights[0] * logp).sum() + (weights[1] * entropy).sum()

    got = jax.grad(loss, (0, 1, 2))(hidden, head, temperature)
    for a, b in zip(got, analytic_gradients(hidden, head, ids, *weights, temperature), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("chunk_size", [0, 5, 36])
@pytest.mark.parametrize("of_entropy", [0.0, 1.0], ids=["told", "rewarded"])
def test_gradients_under_a_frozen_head_against_float64(chunk_size, of_entropy):
    """Made in the forward pass where there are pieces and entropy has no part in the loss."""
    hidden, head, ids = case(5)
    weights = jax.random.normal(jax.random.key(6), (2, 2, 4)) * jnp.array([1.0, of_entropy])[:, None, None]

    def loss(hidden, temperature):
        logp, entropy = fused_token_logprobs(
            hidden, head, ids, chunk_size=chunk_size, temperature=temperature
        )
        total = (weights[0] * logp).sum() + ((weights[1] * entropy).sum() if of_entropy else 0.0)
        return total, entropy

    got, entropy = jax.grad(loss, (0, 1), has_aux=True)(hidden, 0.7)
    expected = analytic_gradients(hidden, head, ids, *weights, 0.7)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1], expected[2], rtol=1e-5, atol=1e-5)
    z = np.float64(hidden) @ np.float64(head)
    np.testing.assert_allclose(entropy, reference(z, ids, 0.7)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [0, 16])
def test_gradients_at_logits_of_1e4_against_float64(chunk_size):
    # Products of small integers and powers of two are exact, so both precisions see the same logits.
    hidden = jnp.array([[[1.0, -1.0], [2.0, 1.0], [0.0, 1.0]]])
    head = jnp.stack([(jnp.arange(V) % 5 - 2.0) * 4096, (jnp.arange(V) % 7 - 3.0) * 2048])
    ids = jnp.array([[3, 36, 7]])
    logp, entropy = fused_token_logprobs(hidden, head, ids, chunk_size=chunk_size)
    expected = reference(np.float64(hidden) @ np.float64(head), ids)
    assert np.abs(np.float64(hidden) @ np.float64(head)).max() > 1e4
    np.testing.assert_allclose(logp, expected[0], rtol=1e-6, atol=2e-3)  # one unit in the last place of 1e4
    np.testing.assert_allclose(entropy, expected[1], atol=2e-3)
    loss = lambda h, w: fused_token_logprobs(h, w, ids, chunk_size=chunk_size)[0].sum()
    got = jax.grad(loss, (0, 1))(hidden, head)
    zeros, ones = np.zeros((1, 3)), np.ones((1, 3))
    exact = analytic_gradients(hidden, head, ids, ones, zeros, 1.0)
    for a, b in zip((*got, jax.grad(loss)(hidden, head)), (*exact[:2], exact[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_both_ways_agree_and_shapes_may_have_any_rank():
    hidden, head, ids = case(7)
    logits = jnp.einsum("btd,dv->btv", hidden, head)
    plain = token_logprobs(logits, ids, 0.8)
    fused = fused_token_logprobs(hidden, head, ids, chunk_size=10, temperature=0.8)[0]
    np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=1e-6)
    grouped = fused_token_logprobs(hidden[None], head, ids[None], chunk_size=10, temperature=0.8)[0]
    np.testing.assert_array_equal(grouped[0], fused)
    one = fused_token_logprobs(hidden[0, :1], head, ids[0, :1], chunk_size=10, temperature=0.8)[0]
    np.testing.assert_allclose(one, plain[0, :1], rtol=1e-5)


def test_no_gradient_is_computed_for_a_frozen_head():
    hidden, head, ids = case(3)
    of_hidden = lambda h: fused_token_logprobs(h, head, ids, chunk_size=16)[0].sum()
    of_both = lambda h, w: fused_token_logprobs(h, w, ids, chunk_size=16)[0].sum()
    count = lambda f, *args: str(jax.make_jaxpr(f)(*args)).count("dot_general")
    assert count(jax.grad(of_both, (0, 1)), hidden, head) == 4
    assert count(jax.grad(of_hidden), hidden) == 2  # and the logits are computed once


def test_no_array_of_the_whole_vocabulary_is_made():
    hidden, head, ids = case(4)
    loss = lambda h: fused_token_logprobs(h, head, ids, chunk_size=8)[0].sum()
    shapes = str(jax.make_jaxpr(jax.grad(loss))(hidden))
    assert f"f32[8,{V}]" not in shapes and f"f32[2,4,{V}]" not in shapes and "f32[8,8]" in shapes
