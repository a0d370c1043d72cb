"""bfloat16 computes, float32 sums: each test has a sum that, kept in bfloat16, stops growing or is rounded away."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.logprobs import fused_token_logprobs, token_logprobs
from rlhf_jax.losses.masking import masked_mean, masked_whiten
from rlhf_jax.losses.sequence import sequence_sum
from rlhf_jax.models import attention, heads, lora, roles
from rlhf_jax.models.attention import DecodeContext, GroupContext
from rlhf_jax.models.llama import Llama, Projection, RMSNorm
from rlhf_jax.models.roles import Role
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.training.algorithms import Network
from rlhf_jax.types import GroupedBatch

MANY = 3000  # ones; in bfloat16 a sum of ones ends at 256
HALF = jnp.bfloat16


def in_bfloat16(model):
    return Llama(dataclasses.replace(model.config, dtype=HALF))


def test_the_norms_mean_and_its_gradient():
    norm = RMSNorm(1e-5)
    x = jnp.full((1, MANY), 3.0, HALF).at[0, 0].set(30.0)  # a mean square of 9.297
    out = norm.apply({"params": {"scale": jnp.ones(MANY)}}, x)
    np.testing.assert_allclose(np.float32(out), np.float32(x) / np.sqrt(9.297), rtol=2**-8)
    tokens = jnp.ones((MANY, 4), HALF)
    total = lambda scale: norm.apply({"params": {"scale": scale}}, tokens).astype(jnp.float32).sum()
    np.testing.assert_allclose(jax.grad(total)(jnp.ones(4)), MANY, rtol=1e-3)


def test_attention_shares_its_softmax_over_many_keys():
    """All scores equal: every value counts the same, in a plain row, a group, and one token against its caches."""
    ones = lambda *shape: jnp.ones(shape, HALF)
    mask = jnp.ones((1, MANY), jnp.int32)
    keys = jnp.zeros((1, MANY + 8, 2, 4), HALF)
    context = GroupContext(mask, jnp.ones((1, 2, 4), jnp.int32))
    out = attention.group_attention(ones(1, MANY + 8, 2, 4), keys, ones(1, MANY + 8, 2, 4), context)
    np.testing.assert_allclose(np.float32(out), 1.0, rtol=2**-7)
    cache = lambda fill, *shape: jnp.full(shape, fill, HALF)
    out = attention.decode_attention(
        ones(1, 2, 2, 4), cache(0, 1, 2, MANY, 4), cache(1, 1, 2, MANY, 4), cache(0, 2, 2, 8, 4),
        cache(1, 2, 2, 8, 4), DecodeContext(mask, jnp.int32(7), jnp.full((1, 2), 7, jnp.int32)),
    )  # fmt: skip
    np.testing.assert_allclose(np.float32(out), 1.0, rtol=2**-7)


def test_the_gradient_of_an_embedding_counts_every_place(tiny_llama):
    """One token in all the places there are: its row gets from each the same."""
    model, params = tiny_llama
    config = dataclasses.replace(model.config, num_layers=1, dtype=HALF)
    silent = params | {"layers": jax.tree.map(lambda x: 0.0 * x[:1], params["layers"])}
    probe = jnp.arange(32.0)[None, None]

    @jax.jit
    def row(ids):
        def total(embedding):
            p = silent | {"embed": {"embedding": embedding}}
            hidden = Llama(config).apply({"params": p}, ids, jnp.ones_like(ids), method=Llama.hidden)
            return (hidden.astype(jnp.float32) * probe).sum()

        return jax.grad(total)(params["embed"]["embedding"])[5]

    once, often = row(jnp.full((1, 1), 5)), row(jnp.full((MANY // 10, 10), 5))
    np.testing.assert_allclose(often, MANY * once, atol=2e-3 * MANY * np.abs(once).max())


def test_gradients_of_adapter_and_bias_are_summed_over_tokens(tiny_llama):
    """To float32's precision, against float64 of the same rounded inputs; a result in bfloat16 is 2e-3 off."""
    model, _ = tiny_llama
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, MANY, 32)), HALF)
    w = {"kernel": jnp.zeros((32, 48)), "bias": jnp.zeros(48)}
    factors = {"a": rng.normal(size=(32, 2)), "b": rng.normal(size=(2, 48))}
    layer = Projection(dataclasses.replace(model.config, dtype=HALF), "up_proj", True)
    probe = jnp.asarray(rng.normal(size=(1, MANY, 48)), HALF)

    def loss(factors, bias):
        y = layer.apply({"params": w | {"bias": bias}}, x, {"up_proj": factors})
        return (y.astype(jnp.float32) * probe).sum()

    small = jax.tree.map(jnp.float32, factors)
    grads, of_bias = jax.grad(loss, (0, 1))(small, w["bias"])
    X, G = np.float64(x[0]), np.float64(probe[0])
    near = lambda found, right: np.testing.assert_allclose(found, right, atol=1e-4 * np.abs(right).max())
    near(grads["b"], (X @ factors["a"]).T @ G)
    near(grads["a"], X.T @ (G @ factors["b"].T))
    near(of_bias, G.sum(0))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_not_rounded(tiny_llama, tied):
    model, params = tiny_llama
    config = dataclasses.replace(model.config, dtype=HALF, tie_embeddings=tied)
    hidden = jax.random.normal(jax.random.key(0), (7, 32), HALF)
    weights = params["embed"]["embedding"].T if tied else params["lm_head"]["kernel"]
    logits = Llama(config).apply({"params": params}, hidden, method=Llama.logits)
    assert logits.dtype == jnp.float32
    expected = np.float64(hidden) @ np.float64(weights.astype(HALF))
    np.testing.assert_allclose(logits, expected, atol=1e-5)  # of magnitude 1: bfloat16 is 4e-3 off


def test_heads_and_means_of_states():
    hidden = jnp.ones((1, 1, MANY + 1, MANY), HALF)
    head = {"kernel": jnp.full(MANY, 1 + 2**-10), "bias": jnp.float32(0)}  # which bfloat16 cannot hold
    np.testing.assert_allclose(heads.apply(head, hidden[:, :, :2]), MANY * (1 + 2**-10), rtol=1e-6)
    several = {"kernel": head["kernel"][:, None], "bias": jnp.zeros(1)}
    np.testing.assert_allclose(heads.apply(several, hidden[:, :, :2]), MANY * (1 + 2**-10), rtol=1e-6)
    mask = jnp.ones((1, 1, MANY), jnp.int32)
    batch = GroupedBatch(mask[:, 0, :1], mask[:, 0, :1], mask, mask)
    mean = roles.pooled(Role(pooling="mean"), hidden[..., :4], batch)
    np.testing.assert_allclose(mean, 1.0, rtol=1e-6)


def test_losses_sum_in_float32():
    """The vocabulary's softmax, in pieces and whole, and means over tokens, of bfloat16 inputs."""
    V = MANY
    hidden, columns = jnp.zeros((5, 4), HALF), jnp.zeros((4, V), HALF)
    ids = jnp.arange(5)
    fused, entropy = fused_token_logprobs(hidden, columns, ids, chunk_size=700)
    whole = token_logprobs(jnp.zeros((5, V), HALF), ids)
    for found in (fused, whole, -entropy):
        np.testing.assert_allclose(found, -np.log(V), rtol=1e-6)
    ones, mask = jnp.ones((2, MANY), HALF), jnp.ones((2, MANY), HALF)
    np.testing.assert_allclose(masked_mean(ones, mask), 1.0, rtol=1e-6)
    np.testing.assert_allclose(sequence_sum(ones, mask), MANY, rtol=1e-6)
    x = jnp.where(jnp.arange(MANY) % 2, 3.0, 1.0).astype(HALF)[None]
    np.testing.assert_allclose(np.abs(masked_whiten(x, mask[:1], unbiased=False)), 1.0, rtol=1e-5)


@pytest.mark.parametrize("peaked", [1.0, 3.0])
def test_the_sampler_says_what_the_trainer_says(tiny_llama, peaked):
    """Log-probabilities of samples, in bfloat16 with float32 weights: a gap of 0.02 nats in the mean, 0.1 at most."""
    model, params = tiny_llama
    model = in_bfloat16(model)
    params = params | {"lm_head": {"kernel": peaked * params["lm_head"]["kernel"]}}
    adapter = lora.init(jax.random.key(1), model.config, lora.LoraConfig(rank=4))
    adapter = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
    ids = jax.random.randint(jax.random.key(2), (8, 8), 3, 60)
    mask = (jnp.arange(8)[None] >= jnp.arange(8)[:, None]).astype(jnp.int32)  # left padding
    made = generate(
        model, params, ids, mask, jax.random.key(3), SamplingConfig(24, num_completions=2), adapter
    )
    batch = GroupedBatch(ids, mask, made.ids, made.mask)
    logprobs, *_ = jax.jit(lambda role: Network(model, 16).logprobs(params, role, batch))(Role(adapter))
    gap = np.asarray(logprobs - made.logprobs)
    assert 0 < np.abs(gap).mean() <= 0.02 and np.abs(gap).max() <= 0.1
    assert np.exp(gap).mean() == pytest.approx(1.0, abs=float(3 * gap.std() / gap.size**0.5))
