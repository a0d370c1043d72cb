"""A run on a quantised base: what its stages read, what leaves it, and what cannot be asked of it."""

import jax
import numpy as np
import pytest

from experiments import cli
from rlhf_jax.checkpoints import tiny
from rlhf_jax.errors import InputError
from rlhf_jax.models import lora, quantise
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.roles import Role
from rlhf_jax.training import checks
from rlhf_jax.training.run import Run

STAGES = ("sft", "preferences", "reward_model", "gate", "trpo", "dpo", "evaluation")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.make(
        str(tmp_path_factory.mktemp("base") / "model"), ["It was good.", "It was bad."], vocab_size=300
    )


def config_of(base, *overrides, name="dpo"):
    config = cli.load_config(f"configs/{name}.py:tiny", list(overrides))
    config.model.path = base
    return config


class Silent:
    def note(self, text): ...


def test_the_base_is_quantised_after_sft_is_merged_and_leaves_the_run_whole(base, tmp_path):
    run = Run(
        config_of(base, "model.quantise=int8", "sft.train=lora", "mesh.fsdp=2", "mesh.data=4"),
        str(tmp_path),
        Silent(),
        None,
    )
    assert run.base is run.raw_base and run.attention == "plain"
    assert run.base_values == sum(x.size for x in jax.tree.leaves(run.unquantised()))
    adapter = lora.init(jax.random.key(0), run.model.config, run.lora)
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
    run.save_role("sft", Role(adapter), {})
    again = Run(run.config, run.workdir, Silent(), None)
    whole = again.unquantised()
    original = again.unquantised(before_sft=True)

    def same(one, other):
        """To rounding, which may decide a code."""
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            if x.dtype == np.int8:
                assert np.abs(np.int32(x) - np.int32(y)).max() <= 1 and (np.asarray(x) == y).mean() > 0.999
            else:
                np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)

    config = again.model.config
    same(whole, lora.merge(original, adapter, run.lora))
    same(again.base, quantise.quantise(whole, config, "int8"))
    same(again.raw_base, quantise.quantise(original, config, "int8"))
    kernel = again.base["layers"]["mlp"]["up_proj"]["codes"]
    assert kernel.dtype == np.int8 and not kernel.sharding.is_fully_replicated
    ids = np.ones((2, 3), np.int32)
    assert np.isfinite(again.model.apply({"params": again.base}, ids, ids)).all()

    run.save_role("sft", Role(base=whole), {})
    with pytest.raises(InputError, match="model.quantise is 'int8'.*holds whole weights"):
        Run(run.config, run.workdir, Silent(), None).base  # noqa: B018


def test_a_quantised_base_can_be_linearised(tiny_llama):
    """As TRPO does: forwards, through the kernels that are made again."""
    model, params = tiny_llama
    held = quantise.quantise(params, model.config, "nf4")
    adapter = lora.init(jax.random.key(0), model.config, lora.LoraConfig(rank=2))
    ids = np.ones((1, 3), np.int32)
    states = lambda adapter: model.apply({"params": held}, ids, ids, adapter, method=Llama.hidden)
    pushed = jax.eval_shape(lambda adapter: jax.linearize(states, adapter)[1](adapter), adapter)
    assert pushed.shape == (1, 3, 32)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("model.quantise=int4",), "config.model.quantise is 'int4'; expected one of none, int8, nf4"),
        (("model.quantise=nf4",), "config.sft.train is 'full'.*'nf4'"),  # as tiny teaches its own base
        (
            ("model.quantise=int8", "sft.train=lora", "dpo.reference_sync_steps=4"),
            "config.dpo.reference_sync_mix is 0.6.*'int8'",
        ),
        (
            ("model.attention=flash",),
            "config.model.attention is 'flash'; expected one of auto, plain, splash",
        ),
    ],
)
def test_what_cannot_be_asked(base, overrides, message):
    with pytest.raises(InputError, match=message):
        checks.check_config(config_of(base, *overrides), STAGES)


def test_attention_of_a_run(base, tmp_path):
    with pytest.raises(InputError, match="config.model.attention is 'splash'.*'cpu'"):
        Run(config_of(base, "model.attention=splash"), str(tmp_path), Silent(), None).attention  # noqa: B018
    with pytest.raises(InputError, match="config.model.attention is 'splash'.*config.trpo"):
        checks.check_config(config_of(base, "model.attention=splash", name="trpo"), STAGES)
    fine = config_of(
        base,
        "model.quantise=int8",
        "sft.train=lora",
        "dpo.reference_sync_steps=4",
        "dpo.reference_sync_mix=1.0",
    )
    checks.check_config(fine, STAGES)
