"""KL in training: what is charged and what is reported, its policy gradient, and runs that end at their budget."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.losses.full_kl import fused_kl
from rlhf_jax.losses.kl import kl_estimate
from rlhf_jax.models import heads, lora
from rlhf_jax.models.roles import Role
from rlhf_jax.sampling.generate import SamplingConfig
from rlhf_jax.training import rollout
from rlhf_jax.training.algorithms import ALGORITHMS, Network
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.update import make_update
from rlhf_jax.types import GroupedBatch

V, R = 3, 3


class Table:
    """In the place of a Network: a policy of V tokens, each of which depends on the one before it."""

    def logprobs(self, base, role, batch):
        before = jnp.concatenate([batch.prompt_ids[:, None, -1:], batch.completion_ids[..., :-1]], axis=-1)
        logits = role.params(base)["table"][before]
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.completion_ids[..., None], axis=-1)
        return logp[..., 0], jnp.zeros(logp.shape[:-1]), logits

    def full_kl(self, base, role, states, reference_states):
        return fused_kl(states, jnp.eye(V), reference_states, jnp.eye(V), chunk_size=2)


def every_completion():
    """[V**R, 1, R], each once, after the prompt token 0."""
    ids = np.stack(np.meshgrid(*[np.arange(V)] * R, indexing="ij"), -1).reshape(-1, 1, R).astype(np.int32)
    n = len(ids)
    ones = np.ones((n, 1), np.float32)
    return GroupedBatch(
        np.zeros((n, 1), np.int32),
        np.ones((n, 1), np.int32),
        ids,
        np.ones_like(ids),
        ones,
        ones > 0,
        0 * ones,
    )


@pytest.fixture(scope="module")
def tables():
    keys = jax.random.split(jax.random.key(0), 2)
    return [{"table": jax.random.normal(key, (V, V)) * 0.7} for key in keys]


def sequence_kl(table, reference, batch):
    logp, _, _ = Table().logprobs({}, Role(base=table), batch)
    gap = logp - Table().logprobs({}, Role(base=reference), batch)[0]
    return (jnp.exp(logp.sum(-1)) * gap.sum(-1)).sum()


@pytest.mark.parametrize("kind", ["k1", "exact"])
def test_the_penalty_has_the_policy_gradient_of_the_kl_of_sequences(tables, kind):
    """REINFORCE without a baseline and of reward 0, over every completion by its probability."""
    policy, reference = tables
    batch, row = jax.tree.map(jnp.asarray, every_completion()), ALGORITHMS["reinforce"]
    old, _, _ = Table().logprobs({}, Role(base=policy), batch)
    settings = row.settings(kl_coeff=1.0, kl_kind=kind, baseline="none")
    frozen = {"base": reference, "policy": Role(base=policy)}
    prepare = rollout.make_prepare(row, settings, Table())
    batch, metrics = prepare(frozen, {"kl_coeff": jnp.float32(1.0)}, batch.replace(old_logprobs=old))
    # A weighted sum of log-probabilities: the score function.
    surrogate = lambda table: (
        jnp.exp(old.sum(-1, keepdims=True))
        * batch.advantages
        * Table().logprobs({}, Role(base=table), batch)[0]
    ).sum()
    expected = jax.grad(sequence_kl)(policy, reference, batch)["table"]
    np.testing.assert_allclose(-jax.grad(surrogate)(policy)["table"], expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_the_exact_penalty_varies_less(tables):
    policy, reference = tables
    batch = jax.tree.map(jnp.asarray, every_completion())
    old, _, _ = Table().logprobs({}, Role(base=policy), batch)
    probability, row = jnp.exp(old.sum(-1)).reshape(-1), ALGORITHMS["reinforce"]
    spread = {}
    for kind in ("k1", "exact"):
        settings = row.settings(kl_coeff=1.0, kl_kind=kind, baseline="none")
        frozen = {"base": reference, "policy": Role(base=policy)}
        prepare = rollout.make_prepare(row, settings, Table())
        done, _ = prepare(frozen, {"kl_coeff": jnp.float32(1.0)}, batch.replace(old_logprobs=old))
        first = done.advantages.reshape(-1, R)[:, 0]
        mean = (probability * first).sum()
        np.testing.assert_allclose(mean, -sequence_kl(policy, reference, batch), rtol=1e-4)
        spread[kind] = float((probability * jnp.square(first - mean)).sum())
    assert spread["exact"] < 0.8 * spread["k1"]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "exact"])
def test_the_kl_reported_is_unbiased_whatever_is_charged(tables, kind):
    policy, reference = tables
    batch, row = jax.tree.map(jnp.asarray, every_completion()), ALGORITHMS["reinforce"]
    old, _, _ = Table().logprobs({}, Role(base=policy), batch)
    ref, _, _ = Table().logprobs({}, Role(base=reference), batch)
    settings = row.settings(kl_coeff=0.3, kl_kind=kind, baseline="none")
    frozen = {"base": reference, "policy": Role(base=policy)}
    prepare = rollout.make_prepare(row, settings, Table())
    _, metrics = prepare(frozen, {"kl_coeff": jnp.float32(0.3)}, batch.replace(old_logprobs=old))
    k1 = kl_estimate(old, ref).sum() / len(old)
    charged = metrics["kl_penalty_nats_per_completion"]
    if kind == "exact":
        assert charged == metrics["kl"] and abs(charged - k1) > 1e-3 and charged > 0
    else:
        np.testing.assert_allclose(metrics["kl"], k1, rtol=1e-5)
        np.testing.assert_allclose(charged, kl_estimate(old, ref, kind).sum() / len(old), rtol=1e-5)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("ppo", dict(kl_control="budget"), "kl_target is 0, which kl_control 'budget'"),
        ("rloo", dict(kl_control="adaptive", kl_target=2.0, kl_coeff=0.0), "kl_coeff is 0, so kl_control"),
        ("grpo", dict(kl_control="budget", kl_target=2.0, kl_coeff=0.0, kl_loss_coeff=0.0), "and kl_loss_coeff is 0"),
        ("reinforce", dict(kl_target=6.0), "kl_target is 6.0, which kl_control 'fixed' does not read"),
        ("rloo", dict(kl_kind="exact"), "needs an advantage for each token"),
        ("grpo", dict(kl_kind="exact"), "kl_loss_kind exact"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(name, changes, message):
    assert message in ALGORITHMS[name].settings(**changes).check()


def test_settings_that_do_not():
    for name, changes in (
        (
            "grpo",
            dict(kl_coeff=0.0, kl_kind="exact", kl_loss_kind="exact", kl_control="budget", kl_target=1.0),
        ),
        ("a2c", dict(kl_kind="exact", kl_control="adaptive", kl_target=1.0)),
    ):
        assert ALGORITHMS[name].settings(**changes).check() is None


def test_every_price_above_0_is_driven_and_a_fixed_one_is_not():
    row = ALGORITHMS["grpo"]
    settings = row.settings(kl_coeff=0.0, kl_control="budget", kl_target=1.0)
    controllers = {k: jnp.float32(v) for k, v in settings.kl_controllers.items()}
    new = row.control(settings, controllers, {"kl": jnp.float32(9.0)}, 8)
    assert new["kl_loss_coeff"] > 0.04 and new["kl_coeff"] == 0 and new["kl_previous"] == 9.0
    fixed = row.settings()
    assert "kl_previous" not in fixed.kl_controllers
    assert row.control(fixed, controllers, {"kl": jnp.float32(9.0)}, 8) is controllers
    adaptive = row.settings(kl_control="adaptive", kl_target=1.0, kl_horizon=10.0)
    new = row.control(adaptive, controllers | {"kl_coeff": jnp.float32(0.5)}, {"kl": jnp.float32(9.0)}, 8)
    np.testing.assert_allclose([new["kl_coeff"], new["kl_loss_coeff"]], [0.5 * 1.16, 0.04 * 1.16], rtol=1e-6)


BUDGETS = {"ppo": {}, "grpo": dict(kl_coeff=0.0, kl_loss_kind="exact")}


@pytest.fixture(scope="module")
def stage(tiny_llama):
    return functools.cache(functools.partial(make_stage, tiny_llama))


def make_stage(tiny_llama, name):
    """(first state, sample, prepare, update): 64 completions of 4 tokens a step."""
    (model, base), row = tiny_llama, ALGORITHMS[name]
    settings, network = row.settings(**BUDGETS[name], kl_control="budget", kl_target=1.0), Network(model, 0)
    policy = Role(adapter=lora.init(jax.random.key(1), model.config, lora.LoraConfig(rank=8)))
    trained = {"policy": policy, "value": Role(head=heads.init_value(model.config.hidden_size))}
    trained = {role: trained[role] for role in row.trains}
    optimizer = make_optimizer(optax.constant_schedule(5e-3), clip_norm=1.0)
    update = jax.jit(make_update(functools.partial(row.objective, settings, network), optimizer))
    state = TrainState(trained, optimizer.init(trained), jnp.int32(0), jax.random.key(0), {})
    prompts, sampling = (
        (jnp.full((16, 3), 5, jnp.int32), jnp.ones((16, 3), jnp.int32)),
        SamplingConfig(4, num_completions=4),
    )
    sample = lambda state, key: rollout.sample(
        network, base, state.trained["policy"], prompts, key, sampling,
        state.trained["value"].head if "value" in row.trains else None,
    )  # fmt: skip
    return state, sample, rollout.make_prepare(row, settings, network), update


@pytest.mark.parametrize("name, target", [("ppo", 0.5), ("ppo", 1.2), ("grpo", 0.8)])
def test_a_run_ends_at_its_budget(tiny_llama, stage, name, target, steps=100):
    """The score is three times the share of tokens below 32; without a price KL goes to about 4 ln 2 = 2.8 nats."""
    row, base = ALGORITHMS[name], tiny_llama[1]
    state, sample, prepare, update = stage(name)
    settings = row.settings(**BUDGETS[name], kl_control="budget", kl_target=target)
    controllers = {k: jnp.float32(v) for k, v in settings.kl_controllers.items()}
    seen = []
    for step in range(steps):
        batch = sample(state, jax.random.fold_in(jax.random.key(7), step))
        batch = batch.replace(scores=3 * (batch.completion_ids < 32).mean(-1).astype(jnp.float32))
        batch, metrics = prepare({"base": base}, controllers, batch)
        state, more = update(state.replace(controllers=controllers), {"base": base}, batch)
        seen.append(float(metrics["kl"]))
        controllers = row.control(settings, controllers, metrics | more, 64)
    np.testing.assert_allclose(np.mean(seen[-25:]), target, rtol=0.1, err_msg=str(np.round(seen, 2)))
