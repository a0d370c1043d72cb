"""Five AdamW steps on every weight of a small checkpoint, against the same steps in torch (tests/golden)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax.checkpoints import huggingface
from rlhf_jax.models.llama import Llama
from rlhf_jax.models.roles import Role, scores
from rlhf_jax.training.algorithms import ALGORITHMS, Network
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.update import make_update
from rlhf_jax.types import GroupedBatch

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
TOLERANCE = 1e-4  # relative, of every loss
ADAMW = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)  # as in make_golden.py


@pytest.fixture(scope="module")
def checkpoint():
    return huggingface.load_llama(str(GOLDEN / "llama2"))


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        found = {key: jnp.asarray(x) for key, x in file.items()}
    ids = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    batch = GroupedBatch(**{key: found[key] for key in ids})
    return batch.replace(weights=jnp.ones(batch.completion_ids.shape[:2])), found


def losses(algorithm, config, trained, batch, steps):
    return train(algorithm, config, trained, {"base": None}, batch, steps)[0]


def train(algorithm, config, trained, frozen, batch, steps):
    """(loss at each step, the trained roles)."""
    row = ALGORITHMS[algorithm]
    optimizer = make_optimizer(1e-3, **ADAMW)
    objective = functools.partial(row.objective, row.settings(), Network(Llama(config), vocab_chunk=40))
    update = jax.jit(make_update(objective, optimizer))
    state = TrainState(trained, optimizer.init(trained), jnp.int32(0), jax.random.key(0), {})
    found = []
    for _ in range(steps):
        state, metrics = update(state, frozen, batch)
        found.append(float(metrics["loss"]))
    return found, state.trained


def test_sft(checkpoint):
    config, params = checkpoint
    batch, expected = golden("sft")
    found = losses("sft", config, {"policy": Role(base=params)}, batch, 5)
    assert expected["losses"][0] - expected["losses"][-1] > 0.01  # it moves, so a wrong step would show
    np.testing.assert_allclose(found, expected["losses"], rtol=TOLERANCE)


def test_reward_model(checkpoint):
    config, params = checkpoint
    batch, expected = golden("reward_model")
    # The vocabulary head takes no part; torch has no bias, and a pairwise loss gives it no gradient.
    role = Role(head={"kernel": expected["head_kernel"], "bias": jnp.zeros(())}, base=params)
    first = scores(Llama(config), {}, role, batch)
    np.testing.assert_allclose(first, expected["first_scores"], atol=1e-4)
    found = losses("reward_model", config, {"reward": role}, batch, 5)
    assert expected["losses"][0] - expected["losses"][-1] > 0.01
    np.testing.assert_allclose(found, expected["losses"], rtol=TOLERANCE)


def test_dpo(checkpoint, tmp_path):
    """Also the weights at the end, by the names that they have on the hub."""
    config, params = checkpoint
    batch, expected = golden("dpo")
    found, trained = train("dpo", config, {"policy": Role(base=params)}, {"base": params}, batch, 5)
    assert expected["losses"][0] - expected["losses"][-1] > 0.5
    np.testing.assert_allclose(found, expected["losses"], rtol=TOLERANCE)
    before, after = {}, {}
    for weights, saved in ((params, before), (trained["policy"].base, after)):
        huggingface.save_llama(str(tmp_path), config, weights)
        for file in tmp_path.glob("*.safetensors"):
            saved |= load_file(file)
    assert set(after) == {name.removeprefix("final/") for name in expected if name.startswith("final/")}
    for name, weight in after.items():
        end = expected[f"final/{name}"]
        off, moved, size = (np.linalg.norm(x) for x in (weight - end, end - before[name], end))
        assert off < TOLERANCE * size and moved > 100 * off, name
