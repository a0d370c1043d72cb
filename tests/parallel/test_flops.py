"""The walk of a program against hand-counted products: loops as they turn, remat's recomputation, branches, shards."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from rlhf_jax.models import lora
from rlhf_jax.models.llama import Llama
from rlhf_jax.parallel import flops
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.training.algorithms.row import Network
from rlhf_jax.types import GroupedBatch

L, N, D = 6, 4, 8
ONE = 2 * N * D * D  # of [N, D] @ [D, D]


def of(function, *arguments, trips=1):
    return flops.count(jax.jit(function).trace(*arguments).jaxpr, trips)


def layers(w, x, remat=False):
    body = lambda h, m: jnp.tanh(h @ m)
    body = jax.checkpoint(body) if remat else body
    return jax.lax.scan(lambda h, m: (body(h, m), None), x, w)[0].sum()


@pytest.fixture
def wx():
    return jnp.ones((L, D, D)), jnp.ones((N, D))


def test_a_scan_counts_as_often_as_it_turns(wx):
    assert of(layers, *wx) == flops.Flops(L * ONE, 0)


def test_remat_is_counted_again(wx):
    # Forward, by the weights, by the inputs; and with remat the forward once more.
    assert of(jax.grad(layers, (0, 1)), *wx).total == 3 * L * ONE
    assert of(jax.grad(functools.partial(layers, remat=True), (0, 1)), *wx).total == 4 * L * ONE


def test_a_loop_that_the_data_end_is_told_apart(wx):
    def decode(w, x):
        y = layers(w, x)
        going = lambda c: c[1].sum() < 10
        return jax.lax.while_loop(going, lambda c: (c[0], c[1] + layers(w, x)), (y, x))[1]

    assert of(decode, *wx, trips=5) == flops.Flops(L * ONE, 5 * L * ONE)


def test_the_dearest_branch_and_nothing_that_is_not_read(wx):
    w, x = wx

    def choose(w, x):
        unread = x @ w[0]  # noqa: F841
        return jax.lax.cond(x.sum() > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[0])

    assert of(choose, w, x).total == 2 * ONE


def test_a_sharded_region_counts_on_every_device(wx):
    mesh = meshes.make_mesh(fsdp=8)
    sharded = jax.shard_map(
        lambda x, m: x @ m,
        mesh=mesh,
        in_specs=(PartitionSpec("fsdp"), PartitionSpec()),
        out_specs=PartitionSpec("fsdp"),
    )
    assert of(sharded, jnp.ones((16, D)), wx[0][0]).total == 2 * 16 * D * D


def layer_products(c):
    """Multiply-adds of one token through one layer, attention's scores apart."""
    return sum(
        functools.reduce(lambda a, b: a * b, inputs + outputs) for inputs, outputs in lora.shapes(c).values()
    )


def test_a_sampler_by_hand(tiny_llama):
    model, params = tiny_llama
    c, B, P, G, R = model.config, 2, 5, 3, 4
    sampling = SamplingConfig(R, num_completions=G, eos_ids=(2,))
    ids = jnp.ones((B, P), jnp.int32)
    traced = generate.trace(model, params, ids, ids, jax.random.key(0), sampling)
    found = flops.count(traced.jaxpr, trips=R - 1)
    head = c.hidden_size * c.vocab_size
    attention = 2 * c.num_heads * c.head_dim  # scores and values, a token and a token read
    prompt = B * P * c.num_layers * (layer_products(c) + P * attention)
    assert found.once == 2 * (prompt + B * G * head)
    token = c.num_layers * (layer_products(c) + (P + R) * attention) + head
    assert found.looped == 2 * B * G * (R - 1) * token


def test_scored_completions_by_hand(tiny_llama):
    """The fused log-probabilities are a loop over pieces of the vocabulary, the last of which overlaps."""
    from rlhf_jax.models.roles import Role

    model, params = tiny_llama
    c, B, P, G, R = model.config, 2, 5, 3, 4
    ones = jnp.ones((B, G, R), jnp.int32)
    batch = GroupedBatch(jnp.ones((B, P), jnp.int32), jnp.ones((B, P), jnp.int32), ones, ones)
    network = Network(Llama(c), vocab_chunk=24)
    found = of(lambda params, batch: network.logprobs(params, Role(), batch)[0], params, batch)
    S = R - 1  # nothing reads the last token's own state
    tokens = B * (P + G * S)
    attention = 2 * c.num_heads * c.head_dim * B * (P * P + G * S * (P + S))
    head = B * G * R * c.hidden_size * 3 * 22  # 64 columns in three pieces
    assert found.total == 2 * (c.num_layers * (tokens * layer_products(c) + attention) + head)
