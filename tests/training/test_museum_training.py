"""Mistakes found in well-known trainers, each of which must fail here: those of the step, not of a loss.

Each test says what the wrong code computes, and checks that ours computes something else, and the right thing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.models import heads, lora
from rlhf_jax.models.roles import Role
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.training import rollout
from rlhf_jax.training.algorithms import ALGORITHMS, Network
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.update import make_update

CONTROLLERS = {"kl_coeff": jnp.float32(0.1)}


def rolled(model, base, name, temperature=1.0, **changes):
    """(settings, network, batch with targets, its metrics) of samples at a temperature, of the reference itself."""
    network, row = Network(model, vocab_chunk=0, temperature=temperature), ALGORITHMS[name]
    settings = row.settings(**changes)
    prompts = jnp.full((4, 3), 5, jnp.int32), jnp.ones((4, 3), jnp.int32)
    head = heads.init_value(model.config.hidden_size) if "value" in row.trains else None
    sampling = SamplingConfig(4, temperature, num_completions=2)
    batch = rollout.sample(network, base, Role(), prompts, jax.random.key(0), sampling, head)
    batch = batch.replace(scores=(batch.completion_ids < 32).mean(-1).astype(jnp.float32))
    return (
        settings,
        network,
        *rollout.make_prepare(row, settings, network)({"base": base}, CONTROLLERS, batch),
    )


def test_b4_every_pass_over_a_rollout_is_made_and_the_clip_can_bind(tiny_llama):
    # One update a rollout, whatever was asked: the ratio is 1 at each and no clip ever binds.
    model, base = tiny_llama
    settings, network, batch, _ = rolled(model, base, "grpo")
    optimizer = optax.chain(optax.sgd(1.0), optax.scale_by_schedule(lambda count: 1.0))  # counts its updates
    adapter = lora.init(jax.random.key(1), model.config, lora.LoraConfig(rank=2))
    trained = {"policy": Role(adapter=adapter)}
    state = TrainState(trained, optimizer.init(trained), jnp.int32(0), jax.random.key(0), CONTROLLERS)
    objective = functools.partial(ALGORITHMS["grpo"].objective, settings, network)
    update = jax.jit(make_update(objective, optimizer, epochs=3, num_minibatches=2))
    state, metrics = update(state, {"base": base}, batch)
    assert int(optax.tree_utils.tree_get(state.opt_state, "count")) == 6
    assert (
        metrics["first_ratio_gap"] < 1e-4 and metrics["clip_fraction"] > 0.01 and metrics["approx_kl"] > 1e-4
    )


def test_b4_b10_policy_and_reference_are_scored_at_the_temperature_of_the_sampler(tiny_llama):
    # Sampled at 0.7 and scored at 1: the first ratio is not 1. The reference alone at another temperature: identical
    # weights have a KL, which is charged.
    model, base = tiny_llama
    settings, network, batch, metrics = rolled(model, base, "ppo", 0.7)
    np.testing.assert_allclose(metrics["kl"], 0.0, atol=1e-5)
    real = np.asarray(batch.completion_mask) > 0
    np.testing.assert_allclose(
        np.asarray(batch.ref_logprobs)[real], np.asarray(batch.old_logprobs)[real], atol=1e-5
    )
    cold, _, _ = Network(model, vocab_chunk=0).logprobs(base, Role(), batch)
    assert np.abs(cold - batch.old_logprobs)[real].max() > 0.1  # what scoring at 1 would have been off by
    trained = {"policy": Role(), "value": Role(head=heads.init_value(model.config.hidden_size))}
    _, (_, found) = ALGORITHMS["ppo"].objective(
        settings, network, trained, {"base": base}, CONTROLLERS, batch, jax.random.key(0)
    )
    assert found["first_ratio_gap"] < 1e-4


def test_b5_the_overlong_penalty_is_of_tokens(tiny_llama):
    # A penalty by the characters of the text would charge ones of four tokens for the letters of their words.
    model, base = tiny_llama
    bare = rolled(model, base, "grpo", advantage_scale="none", kl_coeff=0.0)[2]
    changes = dict(advantage_scale="none", kl_coeff=0.0, overlong_buffer_tokens=2, overlong_penalty=3.0)
    _, _, batch, metrics = rolled(model, base, "grpo", **changes)
    lengths = np.asarray(batch.completion_mask).sum(-1)
    charged = 3.0 * np.clip((lengths - 2) / 2, 0, 1)
    assert metrics["overlong_fraction"] == (lengths > 2).mean() > 0
    difference = (np.asarray(batch.advantages) - np.asarray(bare.advantages))[..., 0]
    np.testing.assert_allclose(difference, charged.mean(1, keepdims=True) - charged, atol=1e-5)
