"""KTO and its kin against plain float64 formulae, in value and gradient, with padded rows and at the extremes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.unpaired import LOSSES, mismatched_kl, unpaired_loss


def sigma(x):
    return 1.0 / (1.0 + np.exp(-x))


# x: log ratio; y: desirable; z: reference point; b: beta; before the weights.
REFERENCE = {
    "kto": lambda x, y, z, b: np.where(y, 1 - sigma(b * (x - z)), 1 - sigma(b * (z - x))),
    "apo_zero_unpaired": lambda x, y, z, b: np.where(y, 1 - sigma(b * x), sigma(b * x)),
}
# Slope of the value by x, sign and all: beta sigma(u) sigma(-u), down for desirable, up for undesirable.
SLOPE = {
    "kto": lambda x, y, z, b: np.where(y, -b, b) * sigma(b * (x - z)) * sigma(b * (z - x)),
    "apo_zero_unpaired": lambda x, y, z, b: np.where(y, -b, b) * sigma(b * x) * sigma(-b * x),
}
WEIGHT, OTHER_WEIGHT = 1.4, 0.6


@functools.cache
def loss_and_gradient(loss_type):
    def weighted(policy, ref, kl, desirable, mask, weights, beta):
        losses, rewards = unpaired_loss(
            policy,
            ref,
            desirable,
            kl,
            mask,
            beta=beta,
            desirable_weight=WEIGHT,
            undesirable_weight=OTHER_WEIGHT,
            loss_type=loss_type,
        )
        return (losses * weights).sum(), (losses, rewards)

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))


def test_every_row_has_a_reference():
    assert set(LOSSES) == set(REFERENCE) == set(SLOPE)


@pytest.mark.parametrize("flags", ["mixed", "all desirable", "none desirable"])
@pytest.mark.parametrize("seed, beta, kl", [(0, 0.1, 0.0), (1, 0.5, 1.7), (2, 2.0, 0.3)])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_value_and_gradient(loss_type, seed, beta, kl, flags):
    rng = np.random.default_rng(seed)
    policy, ref = np.float32(rng.normal(-4.0, 1.5, (2, 25)))
    desirable = {"mixed": rng.uniform(size=25) < 0.5, "all desirable": np.ones(25, bool)}.get(
        flags, np.zeros(25, bool)
    )
    mask = rng.uniform(size=25) < 0.8
    weights = np.float32(rng.uniform(0.5, 2.0, 25))
    hidden = lambda x: np.where(mask, x, np.nan).astype(np.float32)
    (_, (losses, rewards)), grads = loss_and_gradient(loss_type)(
        hidden(policy), hidden(ref), np.float32(kl), desirable, mask, weights, beta
    )
    x, z = np.float64(policy) - np.float64(ref), float(np.float32(kl))
    lambdas = np.where(desirable, WEIGHT, OTHER_WEIGHT)
    want = mask * lambdas * REFERENCE[loss_type](x, desirable, z, beta)
    np.testing.assert_allclose(losses, want, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(rewards, mask * beta * x, rtol=1e-5, atol=1e-6)
    want = mask * weights * lambdas * SLOPE[loss_type](x, desirable, z, beta)
    np.testing.assert_allclose(grads[0], want, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(grads[1], 0.0)  # the reference and the reference point are held fixed
    np.testing.assert_array_equal(grads[2], 0.0)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_far_log_ratios_stay_finite_and_keep_their_digits(loss_type):
    ends = np.float32([-1e4, -300.0, 0.0, 300.0, 1e4])
    policy, flags = np.tile(ends, 2), np.repeat([True, False], 5)
    run = loss_and_gradient(loss_type)
    ones, zeros = np.ones(10, np.float32), np.zeros(10, np.float32)
    (_, (losses, rewards)), grads = run(policy, zeros, np.float32(0), flags, ones, ones, 0.1)
    chex.assert_tree_all_finite((losses, rewards, grads))
    small = np.exp(-30.0) / (1 + np.exp(-30.0))  # 1 - sigma(30), 9.4e-14, which 1 - 1 would lose
    want = np.array([1.0, 1.0 - small, 0.5, small, 0.0])
    np.testing.assert_allclose(losses, np.r_[WEIGHT * want, OTHER_WEIGHT * want[::-1]], rtol=1e-5)


def test_kto_at_its_reference_point_pays_half_of_each_weight():
    policy, ref = jnp.array([-3.0, -70.0]), jnp.array([-4.5, -71.5])
    losses, rewards = unpaired_loss(
        policy, ref, jnp.array([1, 0]), 1.5, beta=0.3, desirable_weight=1.0, undesirable_weight=3.0
    )
    np.testing.assert_array_equal(losses, [0.5, 1.5])
    np.testing.assert_allclose(rewards, 0.45, rtol=1e-6)


def test_kto_by_hand():
    # Log ratio 2, z 1, beta 0.5: u = 0.5, 1 - sigma(u) = 0.377541, slope 0.5 * 0.377541 * 0.622459 = 0.117502.
    one = lambda x: jnp.array([x])
    for desirable, value, slope in ((True, 0.377541, -0.117502), (False, 0.622459, 0.117502)):
        f = lambda p, y=desirable: unpaired_loss(p, one(-3.0), one(y), 1.0, beta=0.5)[0].sum()
        got, grad = jax.value_and_grad(f)(one(-1.0))
        np.testing.assert_allclose(got, value, rtol=1e-5)
        np.testing.assert_allclose(grad, [slope], rtol=1e-5)


def test_kto_without_kl_is_apo_zero():
    policy, ref = np.float32(np.random.default_rng(3).normal(-4.0, 1.0, (2, 6)))
    flags = np.array([1, 0, 1, 1, 0, 0])
    apo = unpaired_loss(policy, ref, flags, None, loss_type="apo_zero_unpaired")
    chex.assert_trees_all_equal(apo, unpaired_loss(policy, ref, flags, 0.0))


def test_flipped_flags_mirror_the_loss():
    policy, ref = np.float32(np.random.default_rng(4).normal(-4.0, 1.0, (2, 6)))
    flags = np.array([1, 0, 1, 1, 0, 0])
    f = lambda flags: unpaired_loss(policy, ref, flags, 0.7)[0]
    np.testing.assert_allclose(f(flags) + f(1 - flags), 1.0, rtol=1e-6)


def test_mismatched_kl():
    rng = np.random.default_rng(5)
    policy, ref = np.float32(rng.normal(-4.0, 1.0, (2, 8)) + np.array([[0.9], [0.0]]))
    mask = np.array([1, 1, 0, 1, 0, 1, 1, 1])
    hidden = lambda x: np.where(mask, x, np.nan).astype(np.float32)
    want = ((np.float64(policy) - np.float64(ref)) * mask).sum() / mask.sum()
    assert want > 0.1
    np.testing.assert_allclose(mismatched_kl(hidden(policy), hidden(ref), mask), want, rtol=1e-6)
    assert mismatched_kl(hidden(ref), hidden(policy), mask) == 0.0  # the mean is negative
    assert mismatched_kl(hidden(policy), hidden(ref), np.zeros(8)) == 0.0
    np.testing.assert_allclose(mismatched_kl(policy[:1], ref[:1] - 9), policy[0] - ref[0] + 9, rtol=1e-6)
    grads = jax.grad(mismatched_kl, argnums=(0, 1))(policy, ref)
    chex.assert_trees_all_equal(grads, (np.zeros(8, np.float32),) * 2)


def test_one_row_none_and_half_precision():
    one = lambda x: jnp.full(1, x, jnp.bfloat16)
    losses, rewards = unpaired_loss(one(-2.0), one(-3.0), jnp.array([True]), jnp.bfloat16(0.5), beta=2.0)
    chex.assert_type([losses, rewards, mismatched_kl(one(-2.0), one(-3.0))], jnp.float32)
    np.testing.assert_allclose([losses[0], rewards[0]], [1 - sigma(1.0), 2.0], rtol=1e-6)
    losses, rewards = unpaired_loss(one(jnp.nan), one(0.0), jnp.array([True]), 0.5, jnp.zeros(1))
    assert (losses[0], rewards[0]) == (0.0, 0.0)


def test_coefficients_may_be_traced():
    policy, ref = np.float32(np.random.default_rng(6).normal(-4.0, 1.0, (2, 5)))
    flags = np.array([1, 0, 1, 0, 0])
    for loss_type in LOSSES:
        f = lambda beta, weight, kind=loss_type: unpaired_loss(
            policy, ref, flags, 0.5, beta=beta, desirable_weight=weight, loss_type=kind
        )[0]
        swept = jax.jit(jax.vmap(f))(jnp.array([0.1, 0.5]), jnp.array([1.0, 3.0]))
        want = np.where(flags, 3.0, 1.0) * REFERENCE[loss_type](np.float64(policy) - ref, flags, 0.5, 0.5)
        np.testing.assert_allclose(swept[1], want, rtol=3e-5)


def test_bad_arguments():
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match="'dpo'; expected one of kto, apo_zero_unpaired"):
        unpaired_loss(x, x, x, 0.0, loss_type="dpo")
    with pytest.raises(ValueError, match="kl is None.*'kto'.*mismatched_kl"):
        unpaired_loss(x, x, x, None)
    with pytest.raises(AssertionError):
        unpaired_loss(x, x, jnp.zeros(3), 0.0)
    with pytest.raises(AssertionError):
        unpaired_loss(x, x, x, x)  # kl is one number for the batch
    with pytest.raises(AssertionError):
        mismatched_kl(x, jnp.zeros(3))
