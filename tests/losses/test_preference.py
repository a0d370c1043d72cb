"""The DPO family against plain float64 formulae, in value and gradient, and at the extremes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.preference import LOSSES, preference_loss
from tests.losses.preference_reference import REFERENCE, SMOOTHING, central_differences, reference


@functools.cache
def loss_and_gradient(loss_type):
    """Losses, rewards and the gradient of the weighted sum of losses, by all four arguments; compiled once a row."""

    def weighted(logprobs, weights, beta):
        losses, chosen, rejected = preference_loss(
            *logprobs, beta=beta, label_smoothing=SMOOTHING, loss_type=loss_type
        )
        return (losses * weights).sum(), (losses, chosen, rejected)

    return jax.jit(jax.value_and_grad(weighted, has_aux=True))


def test_every_row_has_a_reference():
    assert set(LOSSES) == set(REFERENCE)


@pytest.mark.parametrize("seed, beta", [(0, 0.1), (1, 0.5), (2, 2.0)])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_value_and_gradient(loss_type, seed, beta):
    rng = np.random.default_rng(seed)
    logprobs = np.float32(rng.normal(-4.0, 1.5, (4, 25)))
    weights = np.float32(rng.uniform(0.5, 2.0, 25))
    (_, (losses, chosen, rejected)), grads = loss_and_gradient(loss_type)(list(logprobs), weights, beta)
    want = reference(logprobs, loss_type, beta, SMOOTHING)
    np.testing.assert_allclose(losses, want, rtol=2e-5, atol=2e-6)
    exact = np.float64(logprobs)
    np.testing.assert_allclose(chosen, beta * (exact[0] - exact[2]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rejected, beta * (exact[1] - exact[3]), rtol=1e-5, atol=1e-6)
    weighted = lambda xs: (reference(xs, loss_type, beta, SMOOTHING) * weights).sum()
    for argument in (0, 1):
        want = central_differences(weighted, logprobs, argument)
        np.testing.assert_allclose(grads[argument], want, rtol=2e-4, atol=2e-5)
    chex.assert_trees_all_equal(grads[2:], [np.zeros(25, np.float32)] * 2)  # the reference is held fixed


@pytest.mark.parametrize("loss_type", LOSSES)
def test_far_log_ratios_stay_finite(loss_type):
    ends = np.float32([-1e4, -300.0, 0.0, 300.0, 1e4])
    chosen, rejected = (x.ravel() for x in np.meshgrid(ends, ends))
    zeros = np.zeros_like(chosen)
    run = loss_and_gradient(loss_type)
    (_, (losses, *rewards)), grads = run([chosen, rejected, zeros, zeros], np.ones_like(zeros), 0.1)
    chex.assert_tree_all_finite((losses, rewards, grads))


def test_discopop_at_the_far_end_is_the_logistic_loss():
    # h = -1000: the weight of exp(-h) is e^-20000, so the loss is -log sigma(-1000) and its slope -beta.
    far = lambda x: preference_loss(*x, beta=0.1, loss_type="discopop")[0].sum()
    zero = jnp.zeros(1)
    value, grads = jax.value_and_grad(far)([jnp.full(1, -1e4), zero, zero, zero])
    np.testing.assert_allclose(value, 1000.0, rtol=1e-6)
    np.testing.assert_allclose([grads[0][0], grads[1][0]], [-0.1, 0.1], rtol=1e-5)
    # h = +1000: the loss is e^-1000 and its slope 0.
    value, grads = jax.value_and_grad(far)([jnp.full(1, 1e4), zero, zero, zero])
    assert value == 0.0
    assert grads[0][0] == 0.0


def test_far_losses_are_the_asymptotes():
    # Log ratios -1e4 chosen, +1e4 rejected, beta 0.1: h = -2000.
    zero, end = jnp.zeros(1), jnp.full(1, 1e4)
    want = {
        "sigmoid": 0.85 * 2000,
        "hinge": 2001.0,
        "bco_pair": 2000.0,
        "nca_pair": 1500.0,
        "apo_zero": 2.0,
        "apo_down": 1.0,
        "exo_pair": -np.log(SMOOTHING),
        "robust": 0.85 * 2000 / 0.7,
    }
    for loss_type, value in want.items():
        losses, _, _ = preference_loss(-end, end, zero, zero, loss_type=loss_type, label_smoothing=SMOOTHING)
        np.testing.assert_allclose(losses, [value], rtol=1e-6, err_msg=loss_type)


def test_equal_policies_pay_log_two():
    logprobs = jnp.array([-3.0, -70.0])
    for loss_type in ("sigmoid", "sigmoid_norm", "aot", "aot_unpaired", "robust"):
        losses, chosen, rejected = preference_loss(
            logprobs, logprobs, logprobs, logprobs, loss_type=loss_type
        )
        np.testing.assert_allclose(losses, np.log(2.0), rtol=1e-6)
        np.testing.assert_array_equal(chosen, 0.0)
        np.testing.assert_array_equal(rejected, 0.0)


def test_dpo_by_hand():
    # Log ratios 2 and -1, beta 0.5: h = 1.5; -log sigma(1.5) = 0.201413; slope -beta sigma(-1.5) = -0.0912127.
    one = lambda x: jnp.array([x])
    f = lambda pw, pl: preference_loss(pw, pl, one(-3.0), one(-4.0), beta=0.5)[0].sum()
    value, grads = jax.value_and_grad(f, argnums=(0, 1))(one(-1.0), one(-5.0))
    np.testing.assert_allclose(value, 0.201413, rtol=1e-5)
    np.testing.assert_allclose([grads[0][0], grads[1][0]], [-0.0912127, 0.0912127], rtol=1e-5)
    _, chosen, rejected = preference_loss(one(-1.0), one(-5.0), one(-3.0), one(-4.0), beta=0.5)
    assert (chosen[0], rejected[0]) == (1.0, -0.5)


def test_rewards_carry_no_gradient():
    def total(p):
        _, chosen, rejected = preference_loss(p, 2 * p, jnp.zeros(3), jnp.zeros(3))
        return (chosen + rejected).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.ones(3)), 0.0)


@pytest.mark.parametrize("loss_type", [name for name, row in LOSSES.items() if not row.whole_batch])
def test_pairs_do_not_touch_each_other(loss_type):
    logprobs = [np.float32(x) for x in np.random.default_rng(3).normal(-4.0, 1.0, (4, 5))]
    f = lambda xs: preference_loss(*xs, loss_type=loss_type, label_smoothing=SMOOTHING)[0]
    alone = [f([x[i : i + 1] for x in logprobs])[0] for i in range(5)]
    np.testing.assert_allclose(f(logprobs), np.stack(alone), rtol=1e-6)


@pytest.mark.parametrize("loss_type", [name for name, row in LOSSES.items() if row.whole_batch])
def test_transport_losses_ignore_the_order_of_pairs(loss_type):
    logprobs = np.float32(np.random.default_rng(4).normal(-4.0, 1.0, (4, 5)))
    order = np.array([3, 0, 4, 1, 2])
    f = lambda xs: preference_loss(*xs, loss_type=loss_type)[0]
    np.testing.assert_array_equal(f(logprobs), f(logprobs[:, order]))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_smoothed_says_who_reads_label_smoothing(loss_type):
    logprobs = np.float32(np.random.default_rng(5).normal(-4.0, 1.0, (4, 5)))
    few, many = (preference_loss(*logprobs, loss_type=loss_type, label_smoothing=e)[0] for e in (0.1, 0.3))
    assert bool((few != many).any()) == LOSSES[loss_type].smoothed


def test_robust_is_unbiased_under_flipped_labels():
    # Eq. 12 of the paper: averaged over flips with probability e, the loss is the clean DPO loss.
    logprobs = np.float32(np.random.default_rng(6).normal(-4.0, 1.0, (4, 5)))
    kept = preference_loss(*logprobs, loss_type="robust", label_smoothing=0.2)[0]
    flipped = preference_loss(*logprobs[[1, 0, 3, 2]], loss_type="robust", label_smoothing=0.2)[0]
    np.testing.assert_allclose(0.8 * kept + 0.2 * flipped, preference_loss(*logprobs)[0], rtol=1e-5)


def test_one_pair_and_half_precision():
    logprobs = [jnp.full(1, x, jnp.bfloat16) for x in (-2.0, -3.0, -2.5, -2.5)]
    losses, chosen, rejected = preference_loss(*logprobs)
    chex.assert_type([losses, chosen, rejected], jnp.float32)
    np.testing.assert_allclose(losses, reference(logprobs, "sigmoid", 0.1, 0.0), rtol=1e-6)


def test_coefficients_may_be_traced():
    logprobs = np.float32(np.random.default_rng(7).normal(-4.0, 1.0, (4, 5)))
    for loss_type in LOSSES:
        f = lambda beta, e, kind=loss_type: preference_loss(
            *logprobs, beta=beta, label_smoothing=e, loss_type=kind
        )[0]
        swept = jax.jit(jax.vmap(f))(jnp.array([0.1, 0.5]), jnp.array([0.2, 0.3]))
        np.testing.assert_allclose(swept[1], reference(logprobs, loss_type, 0.5, 0.3), rtol=3e-5, atol=3e-6)


def test_bad_arguments():
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match="'dpo'.*sigmoid, hinge, ipo"):
        preference_loss(x, x, x, x, loss_type="dpo")
    for bad in (0.0, -0.1, 1.0):
        with pytest.raises(ValueError, match="label_smoothing.*exo_pair"):
            preference_loss(x, x, x, x, loss_type="exo_pair", label_smoothing=bad)
    with pytest.raises(ValueError, match="label_smoothing.*robust"):
        preference_loss(x, x, x, x, loss_type="robust", label_smoothing=0.5)
    with pytest.raises(AssertionError):
        preference_loss(x, x, x, jnp.zeros(3))
    with pytest.raises(TypeError):
        preference_loss(x, x, x, x, gamma=1.0)
