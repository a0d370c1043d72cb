"""Completions in lanes: what the decoder gives of them is what it gives of padded rows, value and gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data import packing
from rlhf_jax.models import heads, roles
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.training.algorithms import Network
from rlhf_jax.types import GroupedBatch, Lanes
from tests.models.test_group import make_adapter

P, R = 4, 8
LENGTHS = np.array([[1, 3, 0, 2], [7, 1, 2, 1]])


def batch_of(lengths, seed=0):
    B, G = lengths.shape
    keys = jax.random.split(jax.random.key(seed), 2)
    return GroupedBatch(
        prompt_ids=jax.random.randint(keys[0], (B, P), 3, 64),
        prompt_mask=jnp.array([[0, 0, 1, 1], [1, 1, 1, 1]])[:B],
        completion_ids=jax.random.randint(keys[1], (B, G, R), 3, 64),
        completion_mask=(jnp.arange(R)[None, None] < lengths[..., None]).astype(jnp.int32),
        weights=jnp.ones((B, G), jnp.float32),
    )


@pytest.fixture(scope="module")
def pair(tiny_llama):
    """(network, params, role, padded batch, the same in lanes)."""
    model, params = tiny_llama
    batch = batch_of(LENGTHS)
    lanes = packing.lanes(LENGTHS, R)
    head = {"kernel": jax.random.normal(jax.random.key(3), (32,)), "bias": jnp.float32(0.1)}
    role = roles.Role(adapter=make_adapter(model.config), head=head)
    return Network(model, vocab_chunk=24, temperature=0.7), params, role, batch, batch.replace(lanes=lanes)


def test_shapes_by_hand():
    # With slots for an end token 2, 4, 1, 3 and 8, 2, 3, 2: in rows of 9, two each; nothing narrower holds the 7.
    lanes = packing.lanes(LENGTHS, R)
    assert lanes.shape == (2, 9)
    # The longest first: 4, 3 and 2 fill the first lane of the first prompt; 8 of the second leaves room for none.
    np.testing.assert_array_equal(lanes.start, [[7, 0, 9, 4], [0, 12, 9, 14]])
    # 3, 2 and 2: three rows of 3, two of 5, or one of 7, which is the fewest slots.
    assert packing.lanes(np.array([[2, 1, 1], [1, 1, 0]]), R).shape == (1, 7)
    assert packing.lanes(np.array([[R, R], [R, 1]]), R) is None  # nothing to win
    assert packing.lanes(np.array([[1]]), R).shape == (1, 3)


@pytest.mark.parametrize("seed", range(8))
def test_every_token_has_a_slot_of_its_own_and_one_is_left_after_each(seed):
    rng = np.random.default_rng(seed)
    longest, G = int(rng.integers(4, 50)), int(rng.integers(1, 9))
    lengths = np.minimum(rng.geometric(0.2, (5, G)), longest)
    lanes = packing.lanes(lengths, longest)
    if lanes is None:
        assert lengths.max() > longest // 2
        return
    L, W = lanes.shape
    assert L * W < G * longest and L in (G, 1, 2, 3, 4, 6, 8)
    for starts, of_prompt in zip(lanes.start, lengths, strict=True):
        slots = [range(s, s + n + 1) for s, n in zip(starts.tolist(), of_prompt.tolist(), strict=True)]
        assert all(s[0] // W == s[-1] // W for s in slots)  # none goes on in the next lane
        taken = [i for s in slots for i in s]
        assert len(set(taken)) == len(taken) and max(taken) < L * W


def test_log_probabilities_states_values_and_scores_are_the_same(pair):
    network, params, role, padded, laned = pair
    real = np.array(padded.completion_mask, bool)
    for one, other in zip(
        network.logprobs(params, role, padded), network.logprobs(params, role, laned), strict=True
    ):
        np.testing.assert_allclose(other[real], one[real], rtol=1e-5, atol=1e-5)
        assert np.all(np.array(other)[~real] == 0)
    values = [heads.apply(role.head, network.states(params, role, b)) for b in (padded, laned)]
    np.testing.assert_allclose(values[1][real], values[0][real], rtol=1e-5, atol=1e-5)
    for pooling in ("last", "mean"):
        ended = [
            roles.end_with(b, 2, (2,)) for b in (padded, laned)
        ]  # a token more than the lanes are made for
        scores = [roles.scores(network.model, params, role.replace(pooling=pooling), b) for b in ended]
        np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same(pair):
    network, params, role, padded, laned = pair
    pull = jax.random.normal(jax.random.key(9), padded.completion_ids.shape) * padded.completion_mask

    def loss(role, batch):
        logprobs, entropy, states = network.logprobs(params, role, batch)
        values = heads.apply(role.head, states)
        return ((logprobs + 0.3 * entropy + 0.1 * values**2) * pull).sum()

    one, other = (jax.jit(jax.grad(loss))(role, batch) for batch in (padded, laned))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * max(1.0, float(jnp.abs(a).max())))


def test_what_stands_beside_a_completion_does_not_matter(pair):
    """A neighbour's tokens, and what was in the slots that none has, change nothing."""
    network, params, role, _, laned = pair
    logprobs = network.logprobs(params, role, laned)[0]
    ids = laned.completion_ids.at[:, 1:].set(5)  # of all but the first completion, padding too
    changed = network.logprobs(params, role, laned.replace(completion_ids=ids))[0]
    np.testing.assert_array_equal(changed[:, 0], logprobs[:, 0])
    assert np.abs(changed - logprobs).max() > 0.1


def test_fewer_slots_mean_less_work(pair):
    network, params, role, padded, laned = pair
    flops = lambda batch: (
        jax.jit(lambda b: network.logprobs(params, role, b)[0]).lower(batch).cost_analysis()["flops"]
    )
    assert flops(laned) < 0.8 * flops(padded)
    wide = padded.replace(
        lanes=Lanes(jnp.arange(4)[None] * (R + 1) + jnp.zeros((2, 1), jnp.int32), (4, R + 1))
    )
    assert flops(wide) > flops(padded) and math.prod(wide.lanes.shape) == 36


@pytest.mark.parametrize("shape", [(2, 1, 4), (1, 2, 2)])
def test_a_mesh_gives_the_same(pair, shape):
    network, params, role, _, laned = pair
    expected = network.logprobs(params, role, laned)[0]
    mesh = meshes.make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    with meshes.activate(mesh):
        placed = sharding.put_batch(laned, mesh)
        found = jax.jit(lambda role, batch: network.logprobs(params, role, batch)[0])(role, placed)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
