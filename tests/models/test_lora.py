"""Adapters: nothing at the start, the same beside the base and in it, scales and names as the papers have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.models import lora


def random_adapter(config, settings, seed=0):
    adapter = lora.init(jax.random.key(seed), config, settings)
    noise = lambda x: 0.2 * jax.random.normal(jax.random.key(seed + 1), x.shape)
    return adapter.replace(weights=jax.tree.map(noise, adapter.weights))


def logits(model, params, adapter=None):
    ids = jnp.arange(24).reshape(2, 12) % 60
    return jax.jit(lambda p, a: model.apply({"params": p}, ids, jnp.ones_like(ids), a))(params, adapter)


@pytest.mark.parametrize("settings", [{}, {"targets": ("q_proj", "down_proj"), "rslora": True}], ids=str)
def test_beside_the_base_and_merged_into_it(tiny_llama, settings):
    model, params = tiny_llama
    settings = lora.LoraConfig(rank=4, alpha=8.0, **settings)
    adapter = random_adapter(model.config, settings)
    beside, inside = logits(model, params, adapter), logits(model, lora.merge(params, adapter, settings))
    assert float(jnp.abs(beside - logits(model, params)).max()) > 0.1
    np.testing.assert_allclose(beside, inside, atol=1e-5)


def test_a_new_adapter_changes_nothing_and_its_first_gradient_is_of_b(tiny_llama):
    model, params = tiny_llama
    adapter = lora.init(jax.random.key(0), model.config, lora.LoraConfig(rank=4))
    np.testing.assert_array_equal(logits(model, params, adapter), logits(model, params))
    grad = jax.grad(lambda a: jnp.square(logits(model, params, a)).sum())(adapter)
    for factors in grad.weights.values():
        assert not factors["a"].any() and factors["b"].any()


def test_one_projection_by_hand(tiny_llama):
    """Down projection of the last layer only: its delta is scale x A B, added to the kernel."""
    model, params = tiny_llama
    settings = lora.LoraConfig(rank=4, alpha=8.0, targets=("down_proj",))
    adapter = random_adapter(model.config, settings)
    merged = lora.merge(params, adapter, settings)
    before, after = (np.float64(p["layers"]["mlp"]["down_proj"]["kernel"]) for p in (params, merged))
    a, b = (np.float64(adapter.weights["down_proj"][name]) for name in "ab")
    for layer in range(model.config.num_layers):
        np.testing.assert_allclose(after[layer] - before[layer], 2.0 * a[layer] @ b[layer], atol=1e-5)


def test_scales():
    assert lora.LoraConfig(rank=16, alpha=32.0).scale_of("q_proj") == 2.0
    assert lora.LoraConfig(rank=16, alpha=32.0, rslora=True).scale_of("q_proj") == 8.0
    varied = lora.LoraConfig(
        rank=16, alpha=32.0, rank_pattern=(("q_proj", 4),), alpha_pattern=(("q_proj", 2.0),)
    )
    assert (
        varied.scale_of("q_proj") == 0.5
        and varied.scale_of("k_proj") == 2.0
        and varied.rank_of("q_proj") == 4
    )


def test_names():
    assert lora.LoraConfig.from_names(8, 16.0, "attention", False).targets == lora.ATTENTION
    assert lora.LoraConfig.from_names(8, 16.0, "q_proj, up_proj", True).targets == ("q_proj", "up_proj")
    for wrong in ("q_prj", ""):
        with pytest.raises(InputError, match="expected all, attention, or some of q_proj"):
            lora.LoraConfig.from_names(8, 16.0, wrong, False)
    with pytest.raises(InputError, match="rank must be at least 1"):
        lora.LoraConfig(rank=0)
