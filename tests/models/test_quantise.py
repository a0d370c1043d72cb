"""A base in 8 or 4 bits: the codes, the model on them, and steps of training on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.checkpoints import huggingface, quantised
from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, lora, quantise, roles
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling.generate import SamplingConfig, generate
from rlhf_jax.training import state as states
from rlhf_jax.training.algorithms import ALGORITHMS, Network
from rlhf_jax.training.update import make_update
from rlhf_jax.types import GroupedBatch

KINDS = ("int8", "nf4")
LORA = lora.LoraConfig(rank=2)


def dense(params, config):
    """The weights that a quantised base stands for."""
    layers = dict(params["layers"])
    for room in ("attention", "mlp"):
        layers[room] = {
            name: {
                "kernel": jax.vmap(lambda x, n=name: quantise.dequantise(x, len(lora.shapes(config)[n][0])))(
                    held
                )
            }
            for name, held in layers[room].items()
        }
    return params | {"layers": layers}


def noisy_adapter(config):
    adapter = lora.init(jax.random.key(1), config, LORA)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)


def made_batch(B=4, G=2, P=5, R=4):
    rng = np.random.default_rng(0)
    ids = lambda *shape: rng.integers(3, 60, shape).astype(np.int32)
    return GroupedBatch(ids(B, P), np.ones((B, P), np.int32), ids(B, G, R), np.ones((B, G, R), np.int32))


@pytest.mark.parametrize("shape", [(12, 6), (4, 8, 6), (12, 3, 5)])
def test_int8_is_within_half_a_step(shape):
    """One output channel is all zero, another a hundred times the rest: each has a scale of its own."""
    num_inputs = 2 if shape[1] == 8 else 1
    kernel = np.array(jax.random.normal(jax.random.key(0), shape))
    kernel[..., 0], kernel[..., 1] = 0.0, 100.0 * kernel[..., 1]
    held = quantise.quantise_kernel(jnp.asarray(kernel), num_inputs, "int8")
    assert held["codes"].dtype == jnp.int8 and held["codes"].shape == shape
    inputs = tuple(range(num_inputs))
    np.testing.assert_allclose(held["scales"], np.abs(kernel).max(inputs) / 127, rtol=1e-6)
    back = np.asarray(quantise.dequantise(held, num_inputs))
    assert (np.abs(back - kernel) <= 0.5001 * np.asarray(held["scales"])).all()
    assert (back[..., 0] == 0).all()
    np.testing.assert_allclose(np.abs(back).max(inputs), np.abs(kernel).max(inputs), rtol=1e-6)


def test_nf4_levels_are_those_of_the_paper():
    """Quantiles of a normal distribution: 8 above 0 and 7 below it and 0 itself (bitsandbytes' create_normal_map)."""
    from statistics import NormalDist

    offset, inverse = 0.9677083, NormalDist().inv_cdf
    above = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort(np.array([*above, 0.0, *below])) / max(above)
    np.testing.assert_allclose(quantise.NF4_LEVELS, levels, atol=1e-6)
    exact = jnp.asarray(quantise.NF4_LEVELS * 4, jnp.float32)[:, None] * 3.0  # each level is its own code
    held = quantise.quantise_kernel(exact, 1, "nf4")
    np.testing.assert_array_equal(quantise.dequantise(held, 1), exact)
    codes = np.asarray(held["codes"])[:, 0]
    np.testing.assert_array_equal(np.concatenate([codes & 15, codes >> 4]), np.tile(np.arange(16), 4))


@pytest.mark.parametrize("shape, block", [((128, 6), 64), ((4, 32, 6), 32), ((48, 3, 5), 16), ((192, 2), 64)])
def test_nf4_is_the_nearest_level_of_each_block(shape, block):
    num_inputs = 2 if shape[1] == 32 else 1
    kernel = np.array(jax.random.normal(jax.random.key(0), shape))
    kernel[..., :1] *= 50.0
    kernel.reshape(-1, block, *shape[num_inputs:])[0, ..., -1] = 0.0  # a block of nothing
    held = quantise.quantise_kernel(jnp.asarray(kernel), num_inputs, "nf4")
    assert held["codes"].dtype == jnp.uint8 and held["codes"].size * 2 == kernel.size
    cut = kernel.reshape(-1, block, *shape[num_inputs:])
    scales = np.abs(cut).max(1, keepdims=True)
    np.testing.assert_array_equal(np.asarray(held["scales"]).reshape(scales.shape), scales)
    levels = np.float32(quantise.NF4_LEVELS)
    distance = np.abs(cut[..., None] - scales[..., None] * levels)
    nearest = scales * levels[distance.argmin(-1)]
    found = np.asarray(quantise.dequantise(held, num_inputs)).reshape(cut.shape)
    np.testing.assert_allclose(found, nearest, rtol=1e-6)


def test_an_odd_number_of_inputs_cannot_be_packed():
    with pytest.raises(InputError, match="9 inputs.*Use int8"):
        quantise.quantise_kernel(jnp.ones((9, 2)), 1, "nf4")


@pytest.mark.parametrize("kind, share", [("int8", 0.5), ("nf4", 0.25 + 1 / 32)])
def test_memory_is_a_half_and_a_quarter_of_bfloat16(kind, share):
    """Of Llama-2-7B's projections, nothing allocated; nf4's scales, a float32 for 64 weights, are the 32nd more."""
    config = lora_shape(hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32, head_dim=128)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    projections = lambda kind: [
        sharding.llama_abstract(config, jnp.bfloat16, kind)[0]["layers"][room]
        for room in ("attention", "mlp")
    ]
    assert size(projections(kind)) / size(projections("none")) == pytest.approx(share, rel=2e-3)
    shapes, _ = sharding.llama_abstract(config, jnp.bfloat16, kind)
    assert shapes["embed"]["embedding"].dtype == jnp.bfloat16


def lora_shape(**sizes):
    from rlhf_jax.models.config import LlamaConfig

    return LlamaConfig(vocab_size=32000, num_kv_heads=sizes["num_heads"], **sizes)


@pytest.mark.parametrize("kind, remat", [("int8", "full"), ("nf4", "none")])
def test_it_is_the_function_of_the_weights_it_stands_for(tiny_llama, kind, remat):
    """Logits, and gradients of adapters and of the states before a layer: exactly those of the dequantised base."""
    import dataclasses

    model, params = tiny_llama
    model = Llama(dataclasses.replace(model.config, remat=remat))
    held, batch = quantise.quantise(params, model.config, kind), made_batch()

    def loss(adapter, params):
        hidden = roles.states(model, params, Role(adapter), batch)
        return jnp.sum(jnp.sin(model.apply({"params": params}, hidden, method=Llama.logits)))

    grad = jax.jit(jax.value_and_grad(loss))
    found, expected = (grad(noisy_adapter(model.config), p) for p in (held, dense(held, model.config)))
    near = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())
    jax.tree.map(near, found, expected)
    before, after = (model.apply({"params": p}, batch.prompt_ids, batch.prompt_mask) for p in (params, held))
    error = np.abs(before - after).mean() / np.abs(before - before.mean()).mean()
    assert 1e-4 < error < {"int8": 0.03, "nf4": 0.4}[kind]


def test_the_backward_pass_keeps_no_kernels(tiny_llama):
    """Without rematerialisation of layers, what is kept from the forward pass holds no array of a kernel's size."""
    model, params = tiny_llama
    held, batch = quantise.quantise(params, model.config, "int8"), made_batch(B=1, G=1, P=2, R=1)
    loss = lambda adapter: roles.states(model, held, Role(adapter), batch).sum()
    pull = jax.eval_shape(lambda adapter: jax.vjp(loss, adapter)[1], noisy_adapter(model.config))
    kernel = np.prod(params["layers"]["mlp"]["up_proj"]["kernel"].shape)
    kept = [x for x in jax.tree.leaves(pull) if x.size >= kernel and jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(x.shape == params["embed"]["embedding"].shape for x in kept)


def two_steps(name, model, base, mesh):
    """(tokens, metrics and adapter) of two updates of adapters; PPO's on samples of its own."""
    batch, sampled = made_batch().replace(weights=np.ones((4, 2), np.float32)), None
    row, trained = ALGORITHMS[name], {"policy": Role(noisy_adapter(model.config))}
    if name == "ppo":
        trained["value"] = Role(head=heads.init_value(model.config.hidden_size))
    optimizer = optax.sgd(3e-4)
    update = jax.jit(
        make_update(functools.partial(row.objective, row.settings(), Network(model, 0)), optimizer)
    )
    with meshes.activate(mesh):
        state = states.create(trained, optimizer, jax.random.key(4), {"kl_coeff": 0.05}, model.config, mesh)
        batch = sharding.put_batch(batch, mesh)
        if name == "ppo":
            sampling = SamplingConfig(4, num_completions=2, eos_ids=(2,))
            ids, mask, adapter = batch.prompt_ids, batch.prompt_mask, state.trained["policy"].adapter
            made = generate(model, base, ids, mask, jax.random.key(5), sampling, adapter)
            sampled, zeros = jax.device_get(made.ids), jnp.zeros_like(made.logprobs)
            batch = batch.replace(
                completion_ids=made.ids, completion_mask=made.mask, old_logprobs=made.logprobs
            )
            batch = batch.replace(old_values=zeros, advantages=made.logprobs + 2.0, returns=zeros + 1.0)
        for _ in range(2):
            state, metrics = update(state, {"base": base}, batch)
    return sampled, jax.device_get((metrics, state.trained["policy"].adapter))


@pytest.mark.parametrize("name, kind", [("dpo", "int8"), ("ppo", "nf4")])
def test_steps_on_a_mesh_are_those_of_one_device(tiny_llama, name, kind):
    """Codes are split as the kernels are; scales too, but for the few that a block of the whole width has here."""
    model, params = tiny_llama
    held = quantise.quantise(params, model.config, kind)
    sampled, (metrics, adapter) = two_steps(name, model, held, mesh_of(1, 1, 1))
    mesh = mesh_of(1, 2, 2)
    placed = jax.device_put(held, sharding.llama_shardings(model.config, mesh, kind))
    for room in ("attention", "mlp"):
        for projection, parts in placed["layers"][room].items():
            codes, scales = parts["codes"], parts["scales"]
            assert codes.addressable_shards[0].data.size * 4 == codes.size, projection
            assert scales.addressable_shards[0].data.size < scales.size, projection
    same, together = two_steps(name, model, placed, mesh)
    np.testing.assert_array_equal(sampled, same)
    near = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
    jax.tree.map(near, together, (metrics, adapter))
    assert metrics["grad_norm"] > 0


def mesh_of(*shape):
    return meshes.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


@pytest.mark.parametrize("kind", KINDS)
def test_loading_quantises_what_is_merged(tiny_llama, tmp_path, kind):
    """From files, on a mesh, with an adapter in the weights: to the bit what merging and then quantising gives."""
    model, params = tiny_llama
    huggingface.save_llama(str(tmp_path), model.config, params)
    config, plain = huggingface.load_llama(str(tmp_path))
    adapter = noisy_adapter(config)
    expected = quantise.quantise(lora.merge(plain, adapter, LORA), config, kind)
    mesh = mesh_of(1, 2, 2)
    _, found = quantised.load_llama(str(tmp_path), kind, mesh=mesh, adapter=adapter, lora_config=LORA)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
    assert jax.tree.map(lambda x: x.sharding, found) == sharding.llama_shardings(config, mesh, kind)
    with pytest.raises(InputError, match="quantised base"):
        lora.merge(found, adapter, LORA)
