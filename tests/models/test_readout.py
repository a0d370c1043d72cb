"""How outputs become a score, and several models' scores one; that a role on disk keeps it all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoints import roles as role_files
from rlhf_jax.errors import InputError
from rlhf_jax.models import heads, lora, readout, roles
from rlhf_jax.models.readout import Readout
from rlhf_jax.models.roles import Role
from rlhf_jax.rewards import learned
from tests.models.test_roles import batch_of


def test_two_classes():
    outputs = jnp.array([[[1.0, 3.0], [0.5, 0.5]]])
    read = lambda name: readout.score(Readout(name), outputs, {}, None, None, None)
    np.testing.assert_allclose(read("logit"), [[2.0, 0.0]])
    np.testing.assert_allclose(read("probability"), [[0.880797, 0.5]], rtol=1e-6)


def test_gate_by_hand():
    """Two prompts, two aspects: the first weighs them 1 to 3, the second alike; length costs an aspect a tenth."""
    gate = {
        "log_scale": jnp.log(jnp.float32(2.0)),
        "kernel_0": jnp.eye(2),
        "bias_0": jnp.zeros(2),
        "kernel_1": jnp.array([[0.0, 5.0 * np.log(3.0)], [0.0, 0.0]]),
        "bias_1": jnp.zeros(2),
    }
    state = jnp.array([[1.0, 0.0], [-1.0, 4.0]])  # the negative one is cut off
    np.testing.assert_allclose(readout.gate_weights(gate, state, 5.0), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-6)
    outputs, tokens = jnp.array([[[1.0, 2.0]], [[4.0, 0.0]]]), jnp.array([[10], [0]])
    head = {"penalty": jnp.array([0.1, 0.0])}
    score = lambda verbosity: readout.score(
        Readout("gated", 5.0, verbosity), outputs, head, gate, state, tokens
    )
    # 2 * (0.25 * (1 - 1) + 0.75 * 2), 2 * 0.5 * 4.
    np.testing.assert_allclose(score(readout.TOKENS), [[3.0], [4.0]], rtol=1e-6)
    # Without: 2 * (0.25 + 1.5). By aspect 1: 0.1 * 2 off the first aspect.
    np.testing.assert_allclose(score(None), [[3.5], [4.0]], rtol=1e-6)
    np.testing.assert_allclose(score(1), [[3.4], [4.0]], rtol=1e-6)


def test_ensembles_by_hand():
    scores = jnp.array([[[1.0, 0.0]], [[12.0, 10.0]], [[3.0, -1.0]]])
    statistics = {"mean": jnp.array([0.0, 10.0, 0.0]), "std": jnp.array([1.0, 2.0, 1.0])}
    # In units of its own: 1, 1, 3 and 0, 0, -1. Deviations sqrt(8/9), sqrt(2/9).
    combined = lambda name, coeff: readout.combined(Readout(name, spread_coeff=coeff), scores, statistics)
    for name, expected in (
        ("mean_std", [[5 / 3 - 0.5 * 8**0.5 / 3, -1 / 3 - 0.5 * 2**0.5 / 3]]),
        ("mean_variance", [[5 / 3 - 0.5 * 8 / 9, -1 / 3 - 0.5 * 2 / 9]]),
        ("worst", [[1.0, -1.0]]),
    ):
        found, spread = combined(name, 0.5)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_allclose(spread, [[8**0.5 / 3, 2**0.5 / 3]], rtol=1e-6)
    np.testing.assert_allclose(combined("mean_std", 0.0)[0], [[5 / 3, -1 / 3]], rtol=1e-6)
    # Members that agree: no spread, and a slope that is a number.
    same = {"mean": jnp.zeros(2), "std": jnp.ones(2)}
    slope = jax.grad(lambda x: readout.combined(Readout("mean_std"), x, same)[0].sum())(jnp.ones((2, 1, 1)))
    np.testing.assert_allclose(slope, 0.5 * np.ones((2, 1, 1)))


def test_linear_heads():
    head = {"kernel": jnp.array([[1.0, 4.0], [2.0, 1.0]]), "bias": jnp.array([0.5, 0.0])}
    collapsed = readout.linear_head(Readout("logit"), head)
    state = jnp.array([[0.3, -2.0]])
    outputs = heads.apply(head, state)
    np.testing.assert_allclose(heads.apply(collapsed, state), outputs[:, 1] - outputs[:, 0], rtol=1e-6)
    assert readout.linear_head(Readout(), head) is head
    for name in ("probability", "gated", "worst"):
        with pytest.raises(InputError, match=f"read as '{name}'"):
            readout.linear_head(Readout(name), head)


@pytest.fixture(scope="module")
def gated(tiny_llama):
    return lambda seed: gated_role(tiny_llama[0], seed)


def gated_role(model, seed):
    width = model.config.hidden_size
    adapter = lora.init(jax.random.key(seed), model.config, lora.LoraConfig(rank=2))
    weights = jax.tree.map(lambda x: x + 0.05, adapter.weights)
    head = heads.init_reward(jax.random.key(seed + 1), width, 3) | {"penalty": jnp.array([0.1, 0.0, -0.2])}
    gate = readout.init_gate(jax.random.key(seed + 2), width, 3, hidden=8, layers=2)
    how = Readout("gated", 3.0, readout.TOKENS)
    return Role(adapter.replace(weights=weights), head, pooling="mean", gate=gate, readout=how)


def test_an_ensemble_is_its_members_and_is_kept_whole(tiny_llama, gated, tmp_path):
    """Scores of the role read from disk are those of the role written; each member's are those it has alone."""
    model, params = tiny_llama
    members = (gated(0), gated(5))
    statistics = {"mean": jnp.array([0.1, -0.2]), "std": jnp.array([0.5, 2.0])}
    role = Role(head=statistics, members=members, readout=Readout("mean_std", spread_coeff=0.3))
    batch = batch_of([[5, 2], [1, 3]])
    score = jax.jit(
        lambda base, role: learned.score_and_disagreement(model, base, role, batch, (2,), 0.0, 2.0)
    )
    found, spread = score(params, role)
    alone = [score(params, member)[0] * 2.0 for member in members]
    own = np.stack([(np.asarray(x) - m) / s for x, m, s in zip(alone, (0.1, -0.2), (0.5, 2.0), strict=True)])
    np.testing.assert_allclose(found * 2, own.mean(0) - 0.3 * own.std(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(spread * 2, own.std(0), rtol=1e-4, atol=1e-5)

    settings, path = lora.LoraConfig(rank=2), str(tmp_path / "roles" / "reward_model")
    role_files.save_role(path, role, model.config, settings, None, {"kind": "multi_objective"})
    again, kept, meta = role_files.load_role(path, model.config)
    assert kept.rank == 2 and meta["kind"] == "multi_objective" and len(again.members) == 2
    np.testing.assert_array_equal(score(params, again)[0], found)
    # One that was written before there were readouts is a plain score.
    plain = Role(head=heads.init_reward(jax.random.key(0), model.config.hidden_size))
    role_files.save_role(path, plain, model.config, None, None, {})
    meta_file = tmp_path / "roles" / "reward_model" / role_files.META
    meta_file.write_text('{"depth": null, "pooling": "last", "parts": ["head"]}')
    again, _, _ = role_files.load_role(path, model.config)
    assert again.readout == Readout() and again.members == ()
    np.testing.assert_array_equal(
        roles.scores(model, params, again, batch), roles.scores(model, params, plain, batch)
    )
