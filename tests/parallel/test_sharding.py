"""Meshes of 8 virtual devices: everything large is split, and whole steps are those of a single device."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.checkpoints.digest import digest
from rlhf_jax.checkpoints.store import CheckpointStore
from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, lora
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.training import rollout
from rlhf_jax.training import state as states
from rlhf_jax.training.algorithms import ALGORITHMS, Network
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.update import make_update
from rlhf_jax.types import GroupedBatch

SHAPES = [(2, 2, 2), (1, 4, 2)]
LARGE = 512  # values; smaller arrays may be whole everywhere
LAYERS, PROMPTS, COMPLETIONS, PROMPT, COMPLETION, WIDTH, RANK = 2, 8, 2, 6, 8, 32, 16
PROMPTS_A_MINIBATCH = PROMPTS // 2
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def mesh_of(shape):
    return meshes.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def optimizer():
    # Adam divides by the root of a mean square. With the usual eps the smallest gradients, which are rounding, decide
    # by their sign alone and no two machines agree.
    return make_optimizer(optax.constant_schedule(1e-2), eps=1e-3, clip_norm=1.0)


def new_adapter(config):
    """B starts at zero, and then the policy is the reference and its KL says nothing: so, noise."""
    adapter = lora.init(jax.random.key(1), config, lora.LoraConfig(rank=RANK))
    noise = lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape)
    return adapter.replace(weights=jax.tree.map(noise, adapter.weights))


def ppo_step(model, params, shape):
    """One rollout and update on a mesh of this shape: what came out, and what is needed to do another."""
    mesh, config = mesh_of(shape), model.config
    adapter = new_adapter(config)
    trained = {"policy": Role(adapter=adapter), "value": Role(head=heads.init_value(WIDTH))}
    reward = Role(adapter=adapter, head=heads.init_reward(jax.random.key(3), WIDTH))
    row = ALGORITHMS["ppo"]
    settings, network = row.settings(), Network(model, vocab_chunk=0)
    with meshes.activate(mesh):
        base = jax.device_put(params, sharding.llama_shardings(config, mesh))
        reward = jax.device_put(reward, sharding.role_shardings(reward, config, mesh))
        controllers = {"kl_coeff": 0.05, "reward_mean": 0.0, "reward_std": 1.0}
        first = states.create(trained, optimizer(), jax.random.key(4), controllers, config, mesh)
        ids = np.random.default_rng(0).integers(3, 60, (PROMPTS, PROMPT)).astype(np.int32)
        prompts = sharding.put_batch((ids, np.ones_like(ids)), mesh)
        sampling = SamplingConfig(COMPLETION, num_completions=COMPLETIONS, eos_ids=(2,))
        roles = first.trained
        batch = rollout.sample(
            network, base, roles["policy"], prompts, jax.random.key(5), sampling, roles["value"].head
        )
        tokens = jax.device_get(batch.completion_ids)
        scores = rollout.make_scorer(network, (2,))(base, reward, batch, 0.0, 1.0)[0]
        frozen = {"base": base, "reward": reward}
        prepare = rollout.make_prepare(row, settings, network)
        batch, metrics = prepare(frozen, first.controllers, batch.replace(scores=scores))
        objective = functools.partial(row.objective, settings, network)
        update = jax.jit(make_update(objective, optimizer(), epochs=2, num_minibatches=2))
        lowered = update.lower(first, frozen, batch)
        compiled = lowered.compile()
        new, more = compiled(first, frozen, batch)
    return {
        "mesh": mesh,
        "tokens": tokens,
        "metrics": jax.device_get(metrics | more),
        "base": base,
        "first": first,
        "state": new,
        "lowered": lowered.as_text(),
        "hlo": compiled.as_text(),
        "again": lambda state: jax.device_get(compiled(state, frozen, batch)[0].trained),
    }


@pytest.fixture(scope="module")
def run(tiny_llama):
    """PPO on a mesh of the shape asked for, each once."""
    return functools.cache(functools.partial(ppo_step, *tiny_llama))


@pytest.fixture
def alone(run):
    return run((1, 1, 1))


@pytest.fixture(params=SHAPES, ids=str)
def split(request, run):
    return run(request.param)


def assert_same(many, one):
    """To 1e-5 of the largest value of each array, or of 0.1: a head's bias is a sum of terms that cancel."""

    def same(path, x, y):
        x, y = np.asarray(x), np.asarray(y)
        atol = 1e-5 * max(np.abs(y).max(), 0.1)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(same, many, one)


# The same numbers


def test_same_ppo_step_on_one_device_and_on_eight(alone, split):
    np.testing.assert_array_equal(split["tokens"], alone["tokens"])
    one, many = alone["metrics"], split["metrics"]
    assert one["kl"] != 0 and one["grad_norm"] > 0 and one.keys() == many.keys()
    # The loss is a difference of terms near 0.1, and the gap before the first update is nothing but rounding.
    for name in one:
        atol = 2e-5 if name == "first_ratio_gap" else 2e-6
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5, atol=atol, err_msg=name)
    assert_same(split["state"].trained, alone["state"].trained)
    moved = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), alone["state"].trained, alone["first"].trained)
    assert min(jax.tree.leaves(moved)) > 1e-3  # far above the tolerance


def offline_step(model, params, name, shape):
    """One update on fixed groups: (metrics, trained before, trained after); SFT of all weights, a reward adapter."""
    mesh, config, row = mesh_of(shape), model.config, ALGORITHMS[name]
    if name == "sft":
        role = Role(base=params)
    else:
        role = Role(adapter=new_adapter(config), head=heads.init_reward(jax.random.key(3), WIDTH))
    rng, lengths = np.random.default_rng(1), np.arange(PROMPTS * 2).reshape(PROMPTS, 2) % COMPLETION + 1
    ids = rng.integers(3, 60, (PROMPTS, 2, COMPLETION)).astype(np.int32)
    mask = (np.arange(COMPLETION) < lengths[..., None]).astype(np.int32)
    prompts = rng.integers(3, 60, (PROMPTS, PROMPT)).astype(np.int32)
    weights = np.ones((PROMPTS, 2), np.float32)
    batch = GroupedBatch(prompts, np.ones_like(prompts), ids, mask, weights)
    with meshes.activate(mesh):
        frozen = {"base": jax.device_put(params, sharding.llama_shardings(config, mesh))}
        state = states.create({row.trains[0]: role}, optimizer(), jax.random.key(4), {}, config, mesh)
        objective = functools.partial(row.objective, row.settings(), Network(model, vocab_chunk=0))
        update = jax.jit(make_update(objective, optimizer(), num_microbatches=2))
        new, metrics = update(state, frozen, sharding.put_batch(batch, mesh))
    assert_placed(new, mesh)
    return jax.device_get((metrics, state.trained, new.trained))


@pytest.fixture(scope="module")
def offline(tiny_llama):
    return functools.cache(functools.partial(offline_step, *tiny_llama))


# 1 x 2 x 4: two key/value heads on a tensor axis of four.
@pytest.mark.parametrize("name, shape", [("sft", (1, 2, 4)), ("reward_model", (2, 2, 2))])
def test_same_offline_step_on_one_device_and_on_eight(offline, name, shape):
    (metrics, before, after), (many, _, after_many) = offline(name, (1, 1, 1)), offline(name, shape)
    np.testing.assert_allclose(list(many.values()), list(metrics.values()), rtol=1e-5)
    assert_same(after_many, after)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, after)
    assert max(jax.tree.leaves(moved)) > 1e-3


# Where things lie


def ways(name, sizes):
    """Into how many different pieces an array of this path should be cut; written apart from RULES and AXES."""
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    kv = 2 if tensor > 2 else 1  # tiny_llama has two key/value heads
    if "norm" in name:
        return 1
    factor = re.search(r"\['(\w+)_proj'\]\['([ab])'\]", name)
    if factor:  # of an adapter: the side of width D lies along fsdp, the other along both
        projection, side = factor.groups()
        wide = (side == "a") != (projection in ("o", "down"))
        return fsdp if wide else fsdp * (1 if kv > 1 and projection in "kv" else tensor)
    if "k_proj" in name or "v_proj" in name:
        return fsdp if kv > 1 else fsdp * tensor
    return fsdp * tensor


def assert_placed(tree, mesh):
    sizes, checked = dict(mesh.shape), 0
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        assert x.sharding.mesh == mesh, name
        if x.ndim < 2:
            continue
        pieces = {str(shard.index): shard.data.size for shard in x.addressable_shards}
        expected = ways(name, sizes)
        assert len(pieces) == expected and set(pieces.values()) == {x.size // expected}, (
            name,
            x.shape,
            pieces,
        )
        checked += x.size >= LARGE
    assert checked


def test_everything_is_split_as_it_should_be(split):
    """The base, and the state before and after an update: GSPMD may choose other layouts for what jit returns."""
    for tree in (split["base"], split["first"], split["state"]):
        assert_placed(tree, split["mesh"])
    for before, after in zip(jax.tree.leaves(split["first"]), jax.tree.leaves(split["state"]), strict=True):
        assert before.sharding.is_equivalent_to(after.sharding, before.ndim)


def test_moments_lie_as_their_weights(split):
    state = split["state"]
    is_adam = lambda s: hasattr(s, "mu")
    (adam,) = filter(is_adam, jax.tree.leaves(state.opt_state, is_leaf=is_adam))
    for moments in (adam.mu, adam.nu):
        for weights, moment in zip(jax.tree.leaves(state.trained), jax.tree.leaves(moments), strict=True):
            assert weights.sharding.is_equivalent_to(moment.sharding, weights.ndim)


def test_key_value_heads_fewer_than_the_tensor_axis_are_repeated(tiny_llama):
    mesh = mesh_of((1, 2, 4))
    placed = jax.device_put(tiny_llama[1], sharding.llama_shardings(tiny_llama[0].config, mesh))
    assert_placed(placed, mesh)
    kernel = placed["layers"]["attention"]["k_proj"]["kernel"]
    assert kernel.size // kernel.addressable_shards[0].data.size == 2


# That the partitioner was asked


def collectives(hlo):
    return set(re.findall(rf"({'|'.join(COLLECTIVES)})(?:-start)?\(", hlo))


def test_weights_are_gathered_and_gradients_summed(alone, split):
    assert collectives(alone["hlo"]) == set()
    found = collectives(split["hlo"])
    assert "all-gather" in found and found & {"all-reduce", "reduce-scatter"}


def test_saved_activations_are_split_over_the_batch(alone, split):
    """Collectives come with split weights whether or not activations are constrained; these only if they are."""
    tokens = PROMPT + COMPLETIONS * (COMPLETION - 1)
    saved = lambda prompts: f"f32[{LAYERS},{prompts},{tokens},{WIDTH}]"
    assert saved(PROMPTS_A_MINIBATCH) in alone["hlo"]
    assert saved(PROMPTS_A_MINIBATCH) not in split["hlo"] and saved(1) in split["hlo"]
    asked = re.findall(r'sharding_constraint .*\[\{"data", "fsdp"\}, \{\}, \{\}\]', split["lowered"])
    assert len(asked) >= 2  # the embedding and each layer's output


# What is refused


def test_names_without_a_rule_and_sizes_that_do_not_divide(tiny_llama, monkeypatch):
    mesh, config = mesh_of((1, 4, 2)), tiny_llama[0].config
    with pytest.raises(InputError, match="w: logical axis 'embedd' has no rule"):
        sharding.spec(("embedd", "mlp"), (8, 8), mesh, "w")
    with pytest.raises(InputError, match="axis 'mlp' of size 7 cannot be split 2 ways"):
        sharding.spec(("embed", "mlp"), (8, 7), mesh, "w")
    with pytest.raises(InputError, match="a batch of 6 rows cannot be split over 4 devices.*multiple of 4"):
        sharding.put_batch(np.zeros((6, 2)), mesh)
    known = tuple(rule for rule in sharding.RULES if not rule[0].startswith("mlp"))
    monkeypatch.setattr(sharding, "RULES", known)
    with pytest.raises(InputError, match="down_proj.*kernel.*'mlp' has no rule"):
        sharding.llama_shardings(config, mesh)
    with pytest.raises(InputError, match="down_proj.*'mlp_of_adapter' has no rule"):
        sharding.role_shardings(Role(adapter=new_adapter(config)), config, mesh)


def test_every_name_of_the_model_has_a_rule(tiny_llama, monkeypatch):
    """Those of weights, and those that activations are constrained by, where a wrong one would not be noticed."""
    model, params = tiny_llama
    known = {name for name, _ in sharding.RULES} | {None}
    _, names = sharding.llama_abstract(model.config)
    leaves = jax.tree.leaves(names, is_leaf=lambda x: isinstance(x, tuple))
    assert leaves and all(set(leaf) <= known for leaf in leaves)
    seen = []

    def constrain(x, names):
        assert len(names) == x.ndim
        seen.extend(names)
        return x

    monkeypatch.setattr(nn, "with_logical_constraint", constrain)
    ids, sampling = (
        jnp.ones((1, 3), jnp.int32),
        SamplingConfig(2, top_p=0.987),
    )  # not one that is traced already
    jax.eval_shape(lambda params: generate(model, params, ids, ids, jax.random.key(0), sampling), params)
    assert {"batch", "width", "kv_heads"} <= set(seen) <= known


# Checkpoints


def test_a_checkpoint_of_one_mesh_goes_on_on_another(run, tmp_path):
    saved, other = run((2, 2, 2)), run((1, 4, 2))
    with CheckpointStore(str(tmp_path)) as store:
        store.save(1, saved["state"], {})
        restored = store.restore(states.abstract(other["first"])).state
    assert digest(restored) == digest(saved["state"])
    assert_placed(restored, other["mesh"])
    assert_same(other["again"](restored), saved["again"](saved["state"]))
