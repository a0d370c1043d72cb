"""A reference that follows the policy, and objectives that are handed the reference in other ways than as the base."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.models import lora
from rlhf_jax.models.roles import Role
from rlhf_jax.training import reference
from rlhf_jax.training.algorithms import ALGORITHMS
from rlhf_jax.training.algorithms.preference import DPOSettings
from rlhf_jax.training.state import TrainState
from rlhf_jax.training.update import make_update
from tests.training.test_algorithms import Bigrams, bigrams, make_batch, make_roles


def adapted(model, rank=4):
    """A policy whose adapter does something, and its settings."""
    settings = lora.LoraConfig(rank=rank, targets=("q_proj", "down_proj"))
    adapter = lora.init(jax.random.key(1), model.config, settings)
    full = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
    return Role(adapter=full), settings


def test_weights_are_mixed_after_the_adapter_is_merged(tiny_llama):
    model, base = tiny_llama
    policy, settings = adapted(model)
    start = reference.follower(policy, base, 0.6)
    once = reference.follow(start, policy, base, 0.6, settings)
    twice = reference.follow(once, policy, base, 0.6, settings)
    kernel = lambda tree: np.float64(tree["layers"]["mlp"]["down_proj"]["kernel"])
    factors = policy.adapter.weights["down_proj"]
    a, b = (np.float64(factors[name]) for name in "ab")
    moved = settings.scale_of("down_proj") * np.stack([x @ y for x, y in zip(a, b, strict=True)])
    np.testing.assert_array_equal(kernel(start.base), kernel(base))
    np.testing.assert_allclose(kernel(once.base), kernel(base) + 0.6 * moved, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kernel(twice.base), kernel(base) + 0.84 * moved, rtol=1e-5, atol=1e-6)
    embedding = lambda tree: tree["embed"]["embedding"]  # no adapter there
    np.testing.assert_allclose(embedding(twice.base), embedding(base), rtol=1e-6)


def test_mix_1_is_a_copy_of_the_policy(tiny_llama):
    model, base = tiny_llama
    policy, settings = adapted(model)
    start = reference.follower(policy, base, 1.0)
    assert start.base is None  # an adapter is enough
    assert reference.follow(start, policy, base, 1.0, settings) is policy


def steps(every_steps, mix, count, learning_rate=3.0):
    """[(state, metrics)] of DPO on bigrams after each step; the policy starts as the base."""
    row, base, settings = ALGORITHMS["dpo"], bigrams(0), DPOSettings()
    trained = {"policy": Role(base=jax.tree.map(jnp.copy, base))}
    optimizer = optax.sgd(learning_rate)
    update = make_update(functools.partial(row.objective, settings, Bigrams()), optimizer)
    follower = None
    if every_steps:
        follower = reference.follower(trained["policy"], base, mix)
        update = reference.synced(update, every_steps, mix, lora.LoraConfig())
    state = TrainState(trained, optimizer.init(trained), jnp.int32(0), jax.random.key(0), {}, follower)
    update, found = jax.jit(update), []
    for _ in range(count):
        state, metrics = update(state, {"base": base}, make_batch("dpo"))
        found.append((state, metrics))
    return found


@pytest.mark.parametrize("mix", [1.0, 0.6])
def test_follows_each_so_many_steps_and_not_between(mix):
    plain, followed = steps(0, mix, 5), steps(2, mix, 5)
    table = lambda role: np.asarray(role.base["states"])
    start = table(Role(base=bigrams(0)))
    for position, (state, _) in enumerate(followed[:2]):  # the second step is still measured from the base
        np.testing.assert_array_equal(
            table(state.trained["policy"]), table(plain[position][0].trained["policy"])
        )
    want = start
    for count, (state, _) in enumerate(followed, 1):
        if count % 2 == 0:
            want = mix * table(state.trained["policy"]) + (1 - mix) * want
        np.testing.assert_allclose(table(state.reference), want, rtol=1e-5, atol=1e-6)
    margins = [float(metrics["margin"]) for _, metrics in followed]
    assert margins[0] == 0 and margins[1] > 0.01
    if mix == 1:  # right after the copy the policy is the reference
        assert margins[2] == 0 and margins[4] == 0 and margins[3] > 0.01
    else:
        assert 0 < margins[2] < float(plain[2][1]["margin"])


class Counting(Bigrams):
    def __init__(self):
        self.seen = []

    def logprobs(self, base, role, batch):
        self.seen.append(("reference" if role.base is None else "policy", batch.completion_ids.shape[1]))
        return super().logprobs(base, role, batch)


def objective(name, batch, **changes):
    """(loss, metrics, whose log-probabilities of how many completions a prompt were computed)."""
    row, network = ALGORITHMS[name], Counting()
    batch = jax.tree.map(jnp.asarray, batch)
    run = lambda trained: row.objective(
        row.settings(**changes), network, trained, {"base": bigrams(0)}, {}, batch, None
    )
    loss, (_, metrics) = jax.jit(run)(make_roles(name))
    return float(loss), metrics, network.seen


def of_base(batch):
    return Bigrams().logprobs(bigrams(0), Role(), batch)[0]


@pytest.mark.parametrize(
    "name, changes", [("dpo", {}), ("dpo", dict(loss_type="ipo", wpo=True)), ("kto", {})]
)
def test_known_log_probabilities_stand_for_the_reference(name, changes):
    batch = make_batch(name)
    live, _, seen = objective(name, batch, **changes)
    known = jnp.where(batch.completion_mask > 0, of_base(batch), jnp.nan)
    cached, _, seen_then = objective(name, batch.replace(ref_logprobs=known), **changes)
    np.testing.assert_allclose(cached, live, rtol=1e-6)
    if name == "dpo":
        assert seen == [("policy", 2), ("reference", 2)] and seen_then == [("policy", 2)]
    else:  # the mismatched ones beside the prompt's own; nobody knows those before
        assert seen == [("policy", 2), ("policy", 2), ("reference", 4)]
        assert seen_then == [("policy", 2), ("policy", 2), ("reference", 2)]


def test_kto_measures_from_completions_of_the_next_prompt():
    batch = make_batch("kto")
    _, metrics, _ = objective("kto", batch)
    B, G, R = batch.completion_ids.shape
    total, count = 0.0, 0
    for b in range(B):
        other = (b + 1) % B
        for g in range(G):
            if not batch.weights[b, g] or not batch.weights[other, g]:
                continue
            ids = [
                batch.prompt_ids[b, -1],
                *batch.completion_ids[other, g][batch.completion_mask[other, g] > 0],
            ]
            for tables, sign in ((bigrams(1), 1), (bigrams(0), -1)):
                logprobs = jax.nn.log_softmax(tables["states"] @ tables["unembedding"])
                total += sign * sum(float(logprobs[x, y]) for x, y in zip(ids[:-1], ids[1:], strict=True))
            count += 1
    np.testing.assert_allclose(metrics["reference_kl"], max(total / count, 0.0), rtol=1e-4, atol=1e-5)


def test_soft_labels_are_smoothing_of_each_pair():
    batch = make_batch("dpo")
    smoothed, _, _ = objective("dpo", batch, label_smoothing=0.3)
    same, _, _ = objective("dpo", batch.replace(soft_labels=np.full(4, 0.7, np.float32)))
    np.testing.assert_allclose(same, smoothed, rtol=1e-6)
    # Linear in each pair's label, whichever other pairs have.
    ends = [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0.2, 1, 0], [0, 0.8, 0, 1]]
    one, none, some, others = (objective("dpo", batch.replace(soft_labels=np.float32(x)))[0] for x in ends)
    np.testing.assert_allclose(one + none, some + others, rtol=1e-6)
    assert abs(some - others) > 0.01
    assert DPOSettings(loss_type="sigmoid,sft", loss_weights=(1, 1)).reads_soft_labels
    for loss_type in ("hinge", "exo_pair", "sigmoid,robust"):
        assert not DPOSettings(loss_type=loss_type).reads_soft_labels


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(loss_type="sigmoid,sft"), r"loss_weights is \(1.0,\); expected 2"),
        (dict(loss_weights=(-1.0,)), "loss_weights is"),
        (dict(loss_weights=(float("nan"),)), "loss_weights is"),
        (
            dict(loss_type="sigmoid,sigmoid", loss_weights=(1, 1)),
            "loss_type is 'sigmoid,sigmoid'; name each loss once",
        ),
        (dict(loss_type="sigmoid,dpo", loss_weights=(1, 1)), "loss_type is 'dpo'"),
        (dict(loss_type="aot", wpo=True), "wpo is True"),
        (dict(loss_type="hinge,aot", loss_weights=(1, 1), num_microbatches=2), "num_microbatches is 2"),
        (dict(loss_type="sigmoid,sft", loss_weights=(1, 1), tail_weight=0.5), "tail_weight is 0.5"),
        (
            dict(loss_type="sigmoid,nca_pair", loss_weights=(1, 1), f_divergence="js"),
            "'nca_pair', which reads more",
        ),
        (
            dict(reference="cached", reference_sync_steps=4),
            "reference is 'cached' with reference_sync_steps 4",
        ),
        (dict(reference_sync_mix=1.5), "reference_sync_mix is 1.5"),
        (dict(loss_type="sigmoid, ipo", loss_weights=(1, 0.5)), None),
        (dict(loss_type="ipo", f_divergence="js"), None),
        (dict(loss_type="sft", tail_weight=0.5), None),
    ],
)
def test_what_a_config_may_say(changes, said):
    found = DPOSettings(**changes).check()
    assert found is None if said is None else re.search(said, found), found
