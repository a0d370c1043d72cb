"""The exact KL over the vocabulary against float64, in value and gradient; and what samples of it tend to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.full_kl import fused_kl
from rlhf_jax.losses.kl import kl_estimate
from rlhf_jax.losses.logprobs import fused_token_logprobs
from rlhf_jax.parallel import mesh as meshes

V, D = 37, 5
CHUNKS = (0, 1, 7, 36, 1000)  # all at once, none that divides, one that leaves a single column


def case(seed, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = [jax.random.normal(key, (2, 4, D)) * scale for key in keys[:2]]
    return hidden[0], jax.random.normal(keys[2], (D, V)), hidden[1], jax.random.normal(keys[3], (D, V))


def log_softmax(hidden, head, temperature):
    z = np.float64(hidden) @ np.float64(head) / temperature
    return z - np.logaddexp.reduce(z, axis=-1, keepdims=True)


def reference(arrays, temperature=1.0, weights=None):
    """(KL, gradients by hidden_p and unembedding_p of the sum weighted), by hand: d KL / dz = p (log p/q - KL)."""
    log_p, log_q = log_softmax(*arrays[:2], temperature), log_softmax(*arrays[2:], temperature)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    weights = np.ones(kl.shape) if weights is None else np.float64(weights)
    d_z = weights[..., None] * np.exp(log_p) * (log_p - log_q - kl[..., None]) / temperature
    return kl, d_z @ np.float64(arrays[1]).T, np.einsum("btd,btv->dv", np.float64(arrays[0]), d_z)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_value_and_gradients_against_float64(chunk_size, temperature):
    arrays, weights = case(0), jax.random.normal(jax.random.key(9), (2, 4))

    def loss(*arrays):
        kl = fused_kl(*arrays, chunk_size=chunk_size, temperature=temperature)
        return (weights * kl).sum(), kl

    (_, kl), got = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays)
    expected = reference(arrays, temperature, weights)
    np.testing.assert_allclose(kl, expected[0], rtol=1e-5)
    for a, b in zip(got[:2], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    assert not any(g.any() for g in got[2:]) and expected[0].min() > 0.1


def test_the_reference_gradient_is_that_of_differences(slope_of):
    arrays = case(1)
    found = slope_of(lambda h: reference((h, *arrays[1:]))[0].sum(), arrays[0])
    np.testing.assert_allclose(reference(arrays)[1], found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk_size", [0, 16])
def test_logits_of_1e4(chunk_size):
    # Products of small integers and powers of two are exact, so both precisions see the same logits.
    heads = [jnp.stack([(jnp.arange(V) % n - 2.0) * 4096, (jnp.arange(V) % 7 - 3.0) * 2048]) for n in (5, 3)]
    hidden = jnp.array([[[1.0, -1.0], [2.0, 1.0], [0.0, 1.0]]])
    arrays = (hidden, heads[0], hidden[:, ::-1], heads[1])
    expected = reference(arrays)
    assert expected[0].max() > 1e4
    got = fused_kl(*arrays, chunk_size=chunk_size)
    np.testing.assert_allclose(got, expected[0], rtol=1e-6, atol=4e-3)  # units in the last place of 1e4
    grads = jax.grad(lambda h, u: fused_kl(h, u, *arrays[2:], chunk_size=chunk_size).sum(), (0, 1))(
        *arrays[:2]
    )
    for a, b in zip(grads, expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


@pytest.mark.parametrize("chunk_size", [0, 7])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_never_negative_and_exactly_0_between_equals(chunk_size, scale):
    p, head, _, _ = case(2, scale)
    assert not np.asarray(fused_kl(p, head, p, head, chunk_size=chunk_size)).any()
    near = p * (1 + 1e-4 * jax.random.normal(jax.random.key(3), p.shape))
    assert float(fused_kl(near, head, p, head, chunk_size=chunk_size).min()) >= 0.0


@pytest.mark.parametrize("chunk_size", [0, 7])
def test_what_carries_no_weight_is_never_read_back(chunk_size):
    p, head_p, q, head_q = case(4)
    weights = jnp.ones((2, 4)).at[0, 2].set(0.0).at[1].set(0.0)
    broken = [jnp.where(weights[..., None] > 0, x, jnp.nan) for x in (p, q)]

    def loss(p, head, q):
        kl = fused_kl(p, head, q, head_q, chunk_size=chunk_size)
        return jnp.where(weights > 0, kl, 0.0).sum()

    whole, found = (jax.value_and_grad(loss, (0, 1))(a, head_p, b) for a, b in ((p, q), broken))
    assert np.isfinite(found[0]) and found[0] == whole[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], whole[1])


def test_a_frozen_head_costs_no_gradient_and_no_array_of_the_whole_vocabulary_is_made():
    p, head, q, head_q = case(5)
    of_hidden = lambda h: fused_kl(h, head, q, head_q, chunk_size=8).sum()
    of_both = lambda h, u: fused_kl(h, u, q, head_q, chunk_size=8).sum()
    text = str(jax.make_jaxpr(jax.grad(of_hidden))(p))
    both = str(jax.make_jaxpr(jax.grad(of_both, (0, 1)))(p, head))
    assert text.count("dot_general") < both.count("dot_general")
    assert f"f32[8,{V}]" not in text and "f32[8,8]" in text


def test_bfloat16_states_give_float32():
    arrays = [x.astype(jnp.bfloat16) for x in case(6)]
    got = fused_kl(*arrays)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference([np.float32(x) for x in arrays])[0], rtol=0.03)


def test_shapes_must_agree():
    p, head, q, head_q = case(7)
    with pytest.raises(AssertionError):
        fused_kl(p, head, q[:, :3], head_q)
    with pytest.raises(AssertionError):
        fused_kl(p, head, q, head_q[:, :-1])


def test_it_is_what_k1_and_k3_of_samples_tend_to():
    p, head_p, q, head_q = (x[0] if x.ndim == 3 else x for x in case(8, 0.5))
    n, exact = 20_000, fused_kl(p, head_p, q, head_q, chunk_size=7)
    ids = jax.random.categorical(jax.random.key(0), p @ head_p, shape=(n, 4))
    many = lambda h, u: jax.vmap(lambda x: fused_token_logprobs(h, u, x)[0])(ids)
    log_p, log_q = many(p, head_p), many(q, head_q)
    for kind in ("k1", "k3"):
        drawn = np.float64(kl_estimate(log_p, log_q, kind))
        error = np.abs(drawn.mean(0) - np.float64(exact)) / (drawn.std(0) / np.sqrt(n))
        assert error.max() < 4.0, (kind, error)  # standard errors


def test_against_the_uniform_it_is_what_entropy_lacks():
    p, head, q, _ = case(10)
    _, entropy = fused_token_logprobs(p, head, jnp.zeros((2, 4), jnp.int32), chunk_size=7, temperature=0.8)
    kl = fused_kl(p, head, q, jnp.zeros_like(head), chunk_size=16, temperature=0.8)
    np.testing.assert_allclose(kl, np.log(V) - entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [0, 16])
def test_the_same_with_rows_and_vocabulary_split(chunk_size):
    keys = jax.random.split(jax.random.key(11), 4)
    p, q = (jax.random.normal(key, (4, 6, 8)) for key in keys[:2])
    head_p, head_q = (jax.random.normal(key, (8, 40)) for key in keys[2:])
    loss = lambda p, u, q, w: fused_kl(p, u, q, w, chunk_size=chunk_size).sum()
    step = lambda: jax.jit(jax.value_and_grad(loss, (0, 1)))
    alone = step()(p, head_p, q, head_q)
    mesh = meshes.make_mesh(1, 2, 4)
    place = lambda x, *axes: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*axes)))
    heads = [place(x, "fsdp", "tensor") for x in (head_p, head_q)]
    assert heads[0].addressable_shards[0].data.shape == (4, 10)
    with meshes.activate(mesh):
        split = step()(place(p, "fsdp"), heads[0], place(q, "fsdp"), heads[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), split, alone)
