"""Meshes of 8 virtual devices: everything large is split, and a whole PPO step is the one of a single device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, lora
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.training import rollout
from rlhf_jax.training import state as states
from rlhf_jax.training.algorithms import ALGORITHMS, Network
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.update import make_update

SHAPES = [(1, 8, 1), (2, 2, 2)]
LARGE = 512  # values; smaller arrays may be whole everywhere


def mesh_of(shape):
    return meshes.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def ppo_step(model, params, shape):
    """One rollout and update on a mesh of this shape: what came out on the host, and the placed state."""
    mesh, config = mesh_of(shape), model.config
    adapter = lora.init(jax.random.key(1), config, lora.LoraConfig(rank=8))
    # B starts at zero, and then the policy is the reference and its KL says nothing.
    noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape)
    adapter = adapter.replace(weights=jax.tree.map(noise, adapter.weights))
    trained = {"policy": Role(adapter=adapter), "value": Role(head=heads.init_value(config.hidden_size))}
    reward = Role(adapter=adapter, head=heads.init_reward(jax.random.key(3), config.hidden_size))
    optimizer = make_optimizer(optax.constant_schedule(1e-3), clip_norm=1.0)
    row = ALGORITHMS["ppo"]
    settings, network = row.settings(), Network(model, vocab_chunk=0)
    with meshes.activate(mesh):
        base = jax.device_put(params, sharding.llama_shardings(config, mesh))
        reward = jax.device_put(reward, sharding.role_shardings(reward, config, mesh))
        controllers = {"kl_coeff": 0.05, "reward_mean": 0.0, "reward_std": 1.0}
        state = states.create(trained, optimizer, jax.random.key(4), controllers, config, mesh)
        ids = np.random.default_rng(0).integers(3, 60, (8, 6)).astype(np.int32)
        prompts = sharding.put_batch((ids, np.ones_like(ids)), mesh)
        sampling = SamplingConfig(8, num_completions=2, eos_ids=(2,))
        head = state.trained["value"].head
        policy = state.trained["policy"]
        batch = rollout.sample(network, base, policy, prompts, jax.random.key(5), sampling, head)
        tokens = jax.device_get(batch.completion_ids)
        scores = rollout.make_scorer(network, (2,))(base, reward, batch, 0.0, 1.0)
        frozen = {"base": base, "reward": reward}
        prepare = rollout.make_prepare(row, settings, network)
        batch, metrics = prepare(frozen, state.controllers, batch.replace(scores=scores))
        objective = functools.partial(row.objective, settings, network)
        update = jax.jit(make_update(objective, optimizer, epochs=2, num_minibatches=2))
        compiled = update.lower(state, frozen, batch).compile()
        new, more = compiled(state, frozen, batch)
    values = jax.device_get((new.trained, metrics | more))
    return {
        "mesh": mesh,
        "tokens": tokens,
        "values": values,
        "base": base,
        "state": new,
        "hlo": compiled.as_text(),
    }


@pytest.fixture(scope="module")
def alone(tiny_llama):
    return ppo_step(*tiny_llama, (1, 1, 1))


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def split(request, tiny_llama):
    return ppo_step(*tiny_llama, request.param)


def test_same_step_on_one_device_and_on_eight(alone, split):
    np.testing.assert_array_equal(alone["tokens"], split["tokens"])
    one, many = alone["values"], split["values"]
    assert one[1]["kl"] != 0 and one[1]["grad_norm"] > 0
    for name in one[1]:
        np.testing.assert_allclose(many[1][name], one[1][name], rtol=1e-4, atol=1e-5, err_msg=name)
    # Adam divides by the root of a square: the smallest gradients decide by their sign, so a step of 1e-3 an update.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), many[0], one[0])


def test_nothing_large_is_whole_anywhere(split):
    """But for the factors of an adapter on its narrow side, which go with `tensor` and have no axis for `fsdp`."""
    whole = []
    for path, x in jax.tree_util.tree_leaves_with_path((split["base"], split["state"])):
        name = jax.tree_util.keystr(path)
        narrow = "adapter" in name and split["mesh"].shape["tensor"] == 1
        if x.size >= LARGE and x.addressable_shards[0].data.size == x.size and not narrow:
            whole.append(f"{name} {x.shape}")
    assert whole == []


def test_moments_lie_as_their_weights(split):
    state = split["state"]
    adam = next(
        s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")
    )
    for weights, moments in zip(jax.tree.leaves(state.trained), jax.tree.leaves(adam.mu), strict=True):
        assert weights.sharding.is_equivalent_to(moments.sharding, weights.ndim)


def test_the_partitioner_was_asked(alone, split):
    """Constraints that are switched off compile as well, into a program that gathers nothing."""
    collectives = lambda run: set(
        re.findall(r"(all-gather|all-reduce|reduce-scatter|all-to-all)\(", run["hlo"])
    )
    assert collectives(alone) == set()
    assert {"all-gather", "all-reduce"} <= collectives(split)


def test_key_value_heads_fewer_than_the_tensor_axis_are_repeated(tiny_llama):
    model, params = tiny_llama
    placed = jax.device_put(params, sharding.llama_shardings(model.config, mesh_of((1, 2, 4))))
    layers = placed["layers"]
    names = [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(layers)]
    assert any("k_proj" in name for name in names)
    for path, x in jax.tree_util.tree_leaves_with_path(layers):
        shard, name = x.addressable_shards[0].data, jax.tree_util.keystr(path)
        if x.size >= LARGE:
            assert x.size // shard.size == (2 if "k_proj" in name or "v_proj" in name else 8), name


def test_names_without_a_rule_and_sizes_that_do_not_divide():
    mesh = mesh_of((1, 4, 2))
    with pytest.raises(InputError, match="w: logical axis 'embedd' has no rule"):
        sharding.spec(("embedd", "mlp"), (8, 8), mesh, "w")
    with pytest.raises(InputError, match="axis 'mlp' of size 7 cannot be split 2 ways"):
        sharding.spec(("embed", "mlp"), (8, 7), mesh, "w")
    with pytest.raises(InputError, match="a batch of 6 rows cannot be split over 4 devices"):
        sharding.put_batch(np.zeros((6, 2)), mesh)


def test_every_name_of_the_model_has_a_rule(tiny_llama):
    known = {name for name, _ in sharding.RULES} | {None}
    _, names = sharding.llama_abstract(tiny_llama[0].config)
    leaves = jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple))
    assert leaves and all(set(leaf) <= known for leaf in leaves)


@pytest.mark.parametrize(
    "shape, sizes", [((-1, 2, 1), (4, 2, 1)), ((1, -1, 4), (1, 2, 4)), ((2, 2, 2), (2, 2, 2))]
)
def test_mesh_sizes(shape, sizes):
    assert tuple(meshes.make_mesh(*shape).shape.values()) == sizes


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 2, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (1, -2, 1)])
def test_impossible_meshes(shape):
    with pytest.raises(InputError, match="mesh"):
        meshes.make_mesh(*shape)


def test_inactive_mesh_is_noticed():
    """What activate() is for: inside it, a constraint moves an array; with the mesh alone it would not."""
    import flax.linen as nn

    mesh, x = mesh_of((1, 8, 1)), jnp.zeros((8, 4))
    constrain = lambda: jax.jit(lambda x: nn.with_logical_constraint(x, ("batch", "width")))(x)
    with meshes.activate(mesh):
        assert len(constrain().addressable_shards[0].data) == 1
