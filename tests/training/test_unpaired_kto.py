"""KTO on completions judged one by one: the same numbers as on pairs of them, and its KL by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.roles import Role
from rlhf_jax.training.algorithms import ALGORITHMS
from rlhf_jax.types import GroupedBatch
from tests.training.test_algorithms import Bigrams, bigrams, make_batch, make_roles

KTO = ALGORITHMS["kto"]


def unpaired(labels=(1, 0, 1, 1, 0, 0, 1, 0)):
    """The pairs of make_batch as eight groups of one; labels as given, else as in the pairs."""
    batch = make_batch("kto")
    twice, apart = (lambda x: np.repeat(x, 2, axis=0)), (lambda x: x.reshape(8, 1, *x.shape[2:]))
    return GroupedBatch(
        prompt_ids=twice(batch.prompt_ids),
        prompt_mask=twice(batch.prompt_mask),
        completion_ids=apart(batch.completion_ids),
        completion_mask=apart(batch.completion_mask),
        weights=apart(batch.weights),
        soft_labels=np.float32(labels),
    )


def loss_and_gradient(batch, **changes):
    batch = jax.tree.map(jnp.asarray, batch)
    frozen = {"base": bigrams(0)}
    run = lambda trained: KTO.objective(
        KTO.settings(**changes), Bigrams(), trained, frozen, {}, batch, jax.random.key(0)
    )
    (loss, (weight, metrics)), gradient = jax.value_and_grad(run, has_aux=True)(make_roles("kto"))
    return float(loss), float(weight), jax.device_get(metrics), jax.device_get(gradient)


def sums(role, batch):
    """[N] float64: log-probabilities of the completions, masked."""
    logprobs = np.asarray(
        Bigrams().logprobs(bigrams(0), role, jax.tree.map(jnp.asarray, batch))[0], np.float64
    )
    return (logprobs * batch.completion_mask).sum(-1).reshape(-1)


def test_labels_of_pairs_give_the_step_of_pairs():
    changes = dict(loss_type="apo_zero_unpaired", desirable_weight=1.3, undesirable_weight=0.7, beta=0.3)
    paired = loss_and_gradient(make_batch("kto"), **changes)
    alone = loss_and_gradient(unpaired([1, 0] * 4), **changes)
    np.testing.assert_allclose(alone[0], paired[0], rtol=1e-6)
    assert alone[1] == paired[1] == 7  # one completion weighs nothing
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), alone[3], paired[3])


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_and_metrics_by_hand(beta):
    batch = unpaired()
    loss, _, metrics, _ = loss_and_gradient(batch, beta=beta, desirable_weight=2.0)
    (policy,) = make_roles("kto").values()
    real, good = batch.weights.reshape(-1) > 0, batch.soft_labels > 0.5
    ratio = sums(policy, batch) - sums(Role(), batch)
    other = batch.replace(
        completion_ids=np.roll(batch.completion_ids, -1, 0),
        completion_mask=np.roll(batch.completion_mask, -1, 0),
    )
    both = real & np.roll(real, -1)
    kl = max((sums(policy, other) - sums(Role(), other))[both].mean(), 0.0)
    apart = np.where(good, 1, -1) * beta * (ratio - kl)
    want = np.where(good, 2.0, 1.0) / (1 + np.exp(apart))
    np.testing.assert_allclose(loss, want[real].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reference_kl"], kl, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (apart > 0)[real].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], apart[real].mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["desirable_fraction"], good[real].mean(), rtol=1e-6)


def test_what_weighs_nothing_is_never_read():
    batch = unpaired()
    absent = batch.weights[:, 0] == 0
    noise = batch.replace(
        completion_ids=np.where(absent[:, None, None], 7, batch.completion_ids),
        soft_labels=np.where(absent, 1.0 - batch.soft_labels, batch.soft_labels),
    )
    one, other = loss_and_gradient(batch), loss_and_gradient(noise)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), one[3], other[3])
