"""The same tokens, rewards and distances on any mesh: samples with every filter, beams, and an ensemble that scores."""

import functools

import jax
import numpy as np
import pytest

from rlhf_jax.evaluation import side_by_side
from rlhf_jax.models import heads, lora, readout
from rlhf_jax.models.readout import Readout
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling.beam import BeamConfig
from rlhf_jax.sampling.generate import SamplingConfig

PROMPTS = [[5 + i, 6, 7 + i][: 1 + i % 3] for i in range(8)]
SAMPLES = SamplingConfig(
    5,
    temperature=0.8,
    top_k=30,
    top_p=0.9,
    repetition_penalty=1.3,
    num_completions=8,  # 64 rows are more than a layer's weights: those travel, where the tests of PPO have few rows
    eos_ids=(2,),
    min_new_tokens=2,
)
BEAMS = BeamConfig(5, num_beams=3, num_return=2, num_groups=3, diversity_penalty=0.3, eos_ids=(2,))


class Numbers:
    def decode_completion(self, ids):
        return " ".join(map(str, ids))


def reward_of(config):
    """Two members with outputs that a gate weighs by the prompt."""
    member = lambda seed: Role(
        adapter=lora.init(jax.random.key(seed), config, lora.LoraConfig(rank=2)),
        head=heads.init_reward(jax.random.key(seed + 1), config.hidden_size, 3)
        | {"penalty": np.float32([0.1] * 3)},
        gate=readout.init_gate(jax.random.key(seed + 2), config.hidden_size, 3, hidden=4, layers=1),
        readout=Readout("gated", 2.0, readout.TOKENS),
    )
    units = {"mean": np.float32([0.1, -0.2]), "std": np.float32([1.0, 2.0])}
    return Role(members=(member(10), member(20)), head=units, readout=Readout("mean_std"))


def found(model, params, sampling, shape):
    """What an evaluation finds; shape: of the mesh, None: one device without one."""
    config = model.config
    adapter = lora.init(jax.random.key(1), config, lora.LoraConfig(rank=2))
    noise = lambda x: x + 0.2 * jax.random.normal(jax.random.key(2), x.shape)
    policy = Role(adapter=adapter.replace(weights=jax.tree.map(noise, adapter.weights)))
    reward = reward_of(config) if sampling is SAMPLES else None
    ask = functools.partial(
        side_by_side.completions_of,
        prompt_length=3,
        batch_size=8,
        sampling=sampling,
        tokenizer=Numbers(),
        rng=jax.random.key(0),
        against=Role(),
    )
    if shape is None:
        return ask(model, params, policy, PROMPTS, put=lambda x: x, reward=reward and (reward, 0.0, 1.0))
    mesh = meshes.make_mesh(*shape)
    with meshes.activate(mesh):
        base = jax.device_put(params, sharding.llama_shardings(config, mesh))
        place = lambda role: role and jax.device_put(role, sharding.role_shardings(role, config, mesh))
        policy, reward = place(policy), place(reward)
        put = lambda x: sharding.put_batch(x, mesh)
        return ask(model, base, policy, PROMPTS, put=put, reward=reward and (reward, 0.0, 1.0))


# tiny_llama has two key/value heads: on the tensor axis of four they are kept twice.
@pytest.mark.parametrize(
    "sampling, shape", [(SAMPLES, (1, 2, 4)), (BEAMS, (2, 2, 2))], ids=["samples", "beams"]
)
def test_an_evaluation_finds_the_same_on_every_mesh(tiny_llama, sampling, shape):
    alone, split = (found(*tiny_llama, sampling, one) for one in (None, shape))
    assert split.pop("texts") == alone["texts"] and len({str(x) for x in alone["texts"]}) > 4
    for name, x in split.items():
        np.testing.assert_allclose(x, alone[name], rtol=1e-5, atol=1e-5, err_msg=name)
    if sampling is SAMPLES:
        assert np.ptp(split["reward"]) > 0.1 and np.abs(split["kl"]).max() > 0.1
