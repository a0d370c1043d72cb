"""Settings of rows of groups: what they take out of a loss, and which values are refused at config load."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cli, pipeline
from rlhf_jax.errors import InputError
from rlhf_jax.training.algorithms import ALGORITHMS
from rlhf_jax.training.checks import check_config
from rlhf_jax.types import GroupedBatch

B, G, R = 2, 3, 4
LENGTHS = np.array([[4, 4, 2], [3, 4, 1]])
FINISHED = np.array([[True, False, True], [True, False, True]])


class Fixed:
    """In the place of a Network: log-probabilities and entropies of its own."""

    def __init__(self, logprobs, entropies):
        self.values = logprobs, entropies

    def logprobs(self, base, role, batch):
        return *self.values, None


@pytest.fixture
def made():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))
    batch = GroupedBatch(
        prompt_ids=jnp.ones((B, 1), jnp.int32),
        prompt_mask=jnp.ones((B, 1), jnp.int32),
        completion_ids=jnp.ones((B, G, R), jnp.int32),
        completion_mask=jnp.asarray(np.arange(R) < LENGTHS[..., None], jnp.int32),
        weights=jnp.ones((B, G)),
        finished=jnp.asarray(FINISHED),
        scores=draw(B, G),
        old_logprobs=draw(B, G, R),
    )
    return batch, Fixed(batch.old_logprobs + 0.1 * draw(B, G, R), jnp.exp(draw(B, G, R)))


def run(name, batch, network, **changes):
    """(batch with targets, loss, weight)."""
    row, settings = ALGORITHMS[name], ALGORITHMS[name].settings(kl_coeff=0.0, **changes)
    frozen = {"base": None, "policy": None}
    batch, _ = row.prepare(settings, network, frozen, {"kl_coeff": jnp.float32(0)}, batch)
    loss, (weight, _) = row.objective(settings, network, {"policy": None}, frozen, {}, batch, None)
    return batch, float(loss), float(weight)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_truncated_completions_are_judged_but_not_trained_on(made, loss_type):
    batch, network = made
    changes = dict(loss_type=loss_type, kl_loss_coeff=0.0)
    whole, *_ = run("grpo", batch, network, **changes)
    cut, loss, weight = run("grpo", batch, network, mask_truncated=True, **changes)
    np.testing.assert_array_equal(cut.advantages, whole.advantages)  # as if nothing had been cut off
    np.testing.assert_array_equal(cut.weights, FINISHED)
    # The loss in float64, over the finished ones alone.
    real = (np.arange(R) < LENGTHS[..., None]) & FINISHED[..., None]
    ratio = np.exp(np.float64(network.values[0]) - np.float64(batch.old_logprobs))
    a = np.float64(whole.advantages)
    losses = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a) * real
    lengths = np.maximum(real.sum(-1), 1)
    expected, count = {
        "grpo": ((losses.sum(-1) / lengths).sum() / 4, 4),
        "dapo": (losses.sum() / real.sum(), real.sum()),
        "dr_grpo": (losses.sum() / (4 * R), 4),
    }[loss_type]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert weight == count


def test_a_batch_of_truncated_completions_trains_nothing(made):
    batch, network = made
    batch = batch.replace(finished=jnp.zeros((B, G), bool))
    for name, changes in (("grpo", dict(kl_loss_coeff=0.0)), ("rloo", {})):
        assert run(name, batch, network, mask_truncated=True, **changes)[1:] == (0.0, 0.0)


def test_advantages_reach_the_tokens_of_highest_entropy_alone(made):
    batch, network = made
    whole, *_ = run("grpo", batch, network)[:1]
    batch, *_ = run("grpo", batch, network, top_entropy_quantile=0.3)
    real = np.asarray(batch.completion_mask) > 0
    entropies = np.asarray(network.values[1])
    chosen = real & (entropies >= np.quantile(entropies[real], 0.7) - 1e-6)
    assert chosen.sum() == 6 and real.sum() == 18  # of the whole batch: not so many of each completion
    np.testing.assert_array_equal(batch.advantages, np.where(chosen, whole.advantages, 0.0))
    np.testing.assert_array_equal(batch.completion_mask, whole.completion_mask)


def test_whitened_advantages_of_rloo(made):
    batch, network = made
    plain, white = (
        run("rloo", batch, network, whiten_advantages=x)[0].advantages[..., 0] for x in (False, True)
    )
    x = np.float64(plain)
    np.testing.assert_allclose(white, (x - x.mean()) / x.std(ddof=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, override, message",
    [
        ("grpo", "grpo.top_entropy_quantile=0.0", "top_entropy_quantile is 0.0; expected above 0, at most 1"),
        ("grpo", "grpo.top_entropy_quantile=1.5", "top_entropy_quantile is 1.5"),
        ("grpo", "grpo.baseline=median", "grpo.baseline is 'median'; expected one of mean, length_weighted"),
        ("grpo", "grpo.max_refills=-1", "grpo.max_refills is -1; expected 0 or more"),
        (
            "rloo",
            "rloo.overlong_buffer_tokens=13",
            "overlong_buffer_tokens is 13, more than config.data.completion",
        ),
        ("remax", "rewards.normalise=group", "remax could not compare it with its greedy completion"),
        ("a2c", "a2c.returns=td", "a2c.returns is 'td'; expected one of gae, n_step"),
        ("a2c", "a2c.n_step=0", "a2c.n_step is 0; expected a number above 0"),
    ],
)
def test_values_that_are_refused(name, override, message):
    config = cli.load_config(f"configs/{name}.py:tiny", [override])
    with pytest.raises(InputError, match=message):
        check_config(config, tuple(pipeline.STAGES))


def test_sequence_ratios_have_no_tokens_to_choose_from():
    settings = ALGORITHMS["grpo"].settings(top_entropy_quantile=0.2)
    assert settings.check() is None
    for loss_type in ("gspo", "luspo"):
        assert (
            "expected 1, or another loss_type" in dataclasses.replace(settings, loss_type=loss_type).check()
        )
