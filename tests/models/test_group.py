"""The grouped forward, the caches and the adapters against the plain forward of independent rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import heads, lora, roles
from rlhf_jax.models.llama import Llama, empty_cache
from rlhf_jax.parallel import flops
from rlhf_jax.types import GroupedBatch

B, G, P, R = 2, 3, 5, 4
PROMPT_MASKS = {
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
    "one token": [[0, 0, 0, 0, 1], [0, 1, 1, 1, 1]],
}


def make_batch(side, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    lengths = jnp.array([[4, 2, 1], [3, 0, 4]])
    return GroupedBatch(
        prompt_ids=jax.random.randint(keys[0], (B, P), 0, 64),
        prompt_mask=jnp.array(PROMPT_MASKS[side]),
        completion_ids=jax.random.randint(keys[1], (B, G, R), 0, 64),
        completion_mask=(jnp.arange(R)[None, None] < lengths[..., None]).astype(jnp.int32),
    )


def make_adapter(config, scale=0.3):
    adapter = lora.init(jax.random.key(5), config, lora.LoraConfig(rank=3, alpha=6.0))
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(6), len(leaves))
    noisy = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def independent_rows(model, params, batch, adapter):
    """[B, G, P + R, D]: each row is its prompt followed by its completion, padding left in between."""
    tile = lambda x: jnp.repeat(x[:, None], G, axis=1)
    ids = jnp.concatenate([tile(batch.prompt_ids), batch.completion_ids], -1).reshape(B * G, P + R)
    mask = jnp.concatenate([tile(batch.prompt_mask), batch.completion_mask], -1).reshape(B * G, P + R)
    return model.apply({"params": params}, ids, mask, adapter, method=Llama.hidden).reshape(B, G, P + R, -1)


@pytest.mark.parametrize("side", PROMPT_MASKS)
def test_grouped_forward_equals_independent_rows(tiny_llama, side):
    model, params = tiny_llama
    batch, adapter = make_batch(side), make_adapter(model.config)
    prompt, completions = model.apply(
        {"params": params}, batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask, adapter,
        method=Llama.group,
    )  # fmt: skip
    expected = independent_rows(model, params, batch, adapter)
    real = np.array(batch.completion_mask, bool)
    np.testing.assert_allclose(completions[real], expected[:, :, P:][real], atol=1e-5)
    real = np.array(batch.prompt_mask, bool)
    np.testing.assert_allclose(prompt[real], expected[:, 0, :P][real], atol=1e-5)


def test_grouped_gradient_equals_independent_rows(tiny_llama):
    """The gradient through the shared prompt is the sum over its completions."""
    model, params = tiny_llama
    batch, adapter = make_batch("left"), make_adapter(model.config)
    probe = jax.random.normal(jax.random.key(9), (B, G, R, 32)) * batch.completion_mask[..., None]

    def grouped(adapter):
        states = roles.states(model, params, roles.Role(adapter), batch)
        return jnp.sum(states[:, :, 1:] * probe)

    def rows(adapter):
        return jnp.sum(independent_rows(model, params, batch, adapter)[:, :, P:] * probe)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=5e-4)
    jax.tree.map(close, jax.grad(grouped)(adapter), jax.grad(rows)(adapter))


def test_states_of_an_empty_completion_come_from_the_prompt(tiny_llama):
    model, params = tiny_llama
    batch = make_batch("left")
    role = roles.Role(head=heads.init_reward(jax.random.key(1), 32))
    score = roles.scores(model, params, role, batch)[1, 1]  # completion of length 0
    hidden = model.apply({"params": params}, batch.prompt_ids, batch.prompt_mask, method=Llama.hidden)
    np.testing.assert_allclose(score, heads.apply(role.head, hidden[1, -1]), atol=1e-5)


@pytest.mark.parametrize("side", PROMPT_MASKS)
def test_decoding_with_caches_equals_the_grouped_forward(tiny_llama, side):
    model, params = tiny_llama
    batch, adapter = make_batch(side), make_adapter(model.config)
    _, expected = model.apply(
        {"params": params}, batch.prompt_ids, batch.prompt_mask, batch.completion_ids,
        jnp.ones_like(batch.completion_mask), adapter, method=Llama.group,
    )  # fmt: skip
    apply = lambda *a, method: model.apply({"params": params}, *a, adapter, method=method)
    _, prompt_cache = apply(batch.prompt_ids, batch.prompt_mask, method=Llama.prefill)
    cache = empty_cache(model.config, B, G, R)
    for t in range(R):
        step = jnp.int32(t)
        hidden, cache = apply(
            batch.completion_ids[:, :, t], batch.prompt_mask, step, prompt_cache, cache, method=Llama.decode
        )
        np.testing.assert_allclose(hidden, expected[:, :, t], atol=2e-5)


@pytest.fixture(scope="module")
def probed(tiny_llama):
    """remat -> a function of an adapter: its states along a random direction (their squares sum to the norm's)."""
    model, params = tiny_llama
    batch = make_batch("left")
    probe = jax.random.normal(jax.random.key(5), (B, G, R + 1, model.config.hidden_size))

    def probed(remat):
        again = Llama(dataclasses.replace(model.config, remat=remat))
        return lambda adapter: (probe * roles.states(again, params, roles.Role(adapter), batch)).sum()

    return probed


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialisation_changes_no_gradient(tiny_llama, probed, remat):
    adapter = make_adapter(tiny_llama[0].config)
    expected, found = (jax.grad(probed(kind))(adapter) for kind in ("none", remat))
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 0.1
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3), found, expected)


def test_without_it_what_products_gave_is_kept_and_nothing_else(tiny_llama, probed):
    """No product is computed twice; and of the MLP's width, the backward pass finds two arrays a layer."""
    config, adapter = tiny_llama[0].config, make_adapter(tiny_llama[0].config)
    of = lambda function: flops.count(jax.make_jaxpr(function)(adapter)).total
    none, full = (of(jax.grad(probed(kind))) for kind in ("none", "full"))
    assert full - none == pytest.approx(
        of(probed("none")), rel=0.2
    )  # no layer's last product is needed again
    kept = jax.tree.leaves(jax.eval_shape(lambda adapter: jax.vjp(probed("none"), adapter)[1], adapter))
    wide = [x.shape for x in kept if x.ndim > 3 and x.shape[-1] == config.intermediate_size]
    assert len(wide) == 2, wide
