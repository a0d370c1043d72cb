"""Losses without a reference against plain float64 formulae, in value and gradient, and at the extremes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.reference_free import LOSSES, reference_free_loss

GAMMA, SMOOTHING, NLL_COEFF = 0.7, 0.15, 0.3
SHAPED = [name for name, row in LOSSES.items() if row.shaped]


def sigma(x):
    return 1.0 / (1.0 + np.exp(-x))


def cdpo(h, e):
    return -(1 - e) * np.log(sigma(h)) - e * np.log(sigma(-h))


def odds(x):
    return np.exp(x) / (1 - np.exp(x))


# c, r: log-probabilities of chosen and rejected, shaped where the row is; b: beta; e: label smoothing.
REFERENCE = {
    "orpo": lambda c, r, b, e: -b * np.log(sigma(np.log(odds(c) / odds(r)))),
    "cpo": lambda c, r, b, e: cdpo(b * (c - r), e),
    "cpo_hinge": lambda c, r, b, e: np.maximum(0.0, 1 - b * (c - r)),
    "cpo_ipo": lambda c, r, b, e: ((c - r) - 1 / (2 * b)) ** 2,
    "simpo": lambda c, r, b, e: cdpo(b * (c - r - GAMMA / b), e),
}


def shaped(x, alpha):
    return x if alpha == 0 else (1 - np.exp(x) ** -alpha) / alpha


def reference(xs, loss_type, beta, smoothing=SMOOTHING, alpha=0.0):
    chosen, rejected, nll = (np.asarray(x, np.float64) for x in xs)
    return (
        REFERENCE[loss_type](shaped(chosen, alpha), shaped(rejected, alpha), beta, smoothing)
        + NLL_COEFF * nll
    )


@functools.cache
def loss_and_gradient(loss_type, alpha=0.0):
    def weighted(xs, weights, beta):
        losses, chosen, rejected = reference_free_loss(
            *xs,
            beta=beta,
            nll_coeff=NLL_COEFF,
            gamma=GAMMA,
            shape_alpha=alpha,
            label_smoothing=SMOOTHING,
            loss_type=loss_type,
        )
        return (losses * weights).sum(), (losses, chosen, rejected)

    return jax.jit(jax.value_and_grad(weighted, has_aux=True))


def random_pairs(seed, n=25):
    """Averages of log-probabilities, -0.02 to -4 nats, and a negative log-likelihood."""
    rng = np.random.default_rng(seed)
    return np.float32([*-np.exp(rng.uniform(np.log(0.02), np.log(4.0), (2, n))), rng.gamma(2.0, 1.0, n)])


def test_every_row_has_a_reference():
    assert set(LOSSES) == set(REFERENCE)


CASES = [(name, 0.0) for name in LOSSES] + [(name, alpha) for name in SHAPED for alpha in (0.25, -0.5, 1.0)]


@pytest.mark.parametrize("seed, beta", [(0, 0.1), (1, 2.5)])
@pytest.mark.parametrize("loss_type, alpha", CASES)
def test_value_and_gradient(loss_type, alpha, seed, beta, slope_of):
    xs = random_pairs(seed)
    weights = np.float32(np.random.default_rng(seed + 9).uniform(0.5, 2.0, 25))
    (_, (losses, chosen, rejected)), grads = loss_and_gradient(loss_type, alpha)(list(xs), weights, beta)
    np.testing.assert_allclose(losses, reference(xs, loss_type, beta, alpha=alpha), rtol=2e-5, atol=2e-6)
    exact = shaped(np.float64(xs), alpha)
    np.testing.assert_allclose(chosen, beta * exact[0], rtol=1e-5)
    np.testing.assert_allclose(rejected, beta * exact[1], rtol=1e-5)
    want = slope_of(lambda xs: (reference(xs, loss_type, beta, alpha=alpha) * weights).sum(), xs)
    # Shaped rewards reach exp(4), and differences carry the error of the largest.
    np.testing.assert_allclose(np.stack(grads), want, rtol=2e-4, atol=2e-6 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("loss_type, alpha", CASES)
def test_far_log_probabilities_stay_finite(loss_type, alpha):
    ends = np.float32([-1e4, -300.0, -1.0, -1e-7, 0.0, 1e-7])  # certain tokens, and rounding beyond them
    chosen, rejected = (x.ravel() for x in np.meshgrid(ends, ends))
    zeros = np.zeros_like(chosen)
    got = loss_and_gradient(loss_type, alpha)([chosen, rejected, zeros], np.ones_like(zeros), 0.1)
    chex.assert_tree_all_finite(got)


def test_far_losses_are_the_asymptotes():
    zero, end = jnp.zeros(1), jnp.full(1, -1e4)
    f = lambda c, r, **kwargs: reference_free_loss(c, r, zero, **kwargs)[0]
    # h = -2e4 or 2e4 at beta 2; SimPO adds its margin, ORPO's lambda is its beta, so -lambda * log odds ratio.
    np.testing.assert_allclose(f(end, zero, beta=2.0, loss_type="cpo"), 2e4, rtol=1e-6)
    np.testing.assert_allclose(f(end, zero, beta=2.0, gamma=3e4, loss_type="simpo"), 5e4, rtol=1e-6)
    np.testing.assert_allclose(f(end, zero, beta=2.0, loss_type="cpo_hinge"), 20001.0, rtol=1e-6)
    for loss_type in ("cpo", "cpo_hinge", "simpo"):
        assert f(zero, end, beta=2.0, loss_type=loss_type)[0] == 0.0
    np.testing.assert_allclose(
        f(end, zero - 1.0, loss_type="orpo"), 0.1 * (1e4 + np.log(odds(-1.0))), rtol=1e-6
    )


def test_orpo_by_hand():
    # p = 0.5 against 0.2: odds 1 and 1/4, ratio 4; -log sigma(log 4) = log(5/4). Slopes by log p: sigma(-log 4) = 1/5
    # times 1 / (1 - p): 2 for chosen, down, and 1.25 for rejected, up. NLL log 2 with weight 1.
    chosen, rejected = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.2]))
    f = lambda c, r, nll: reference_free_loss(c, r, nll, beta=0.1, loss_type="orpo")[0].sum()
    value, grads = jax.value_and_grad(f, argnums=(0, 1, 2))(chosen, rejected, -chosen)
    np.testing.assert_allclose(value, 0.1 * np.log(1.25) + np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(np.ravel(grads), [-0.04, 0.025, 1.0], rtol=1e-5)


@pytest.mark.parametrize("loss_type, alpha", [c for c in CASES if c[0] not in ("cpo_hinge", "cpo_ipo")])
def test_chosen_up_and_rejected_down(loss_type, alpha):
    _, grads = loss_and_gradient(loss_type, alpha)(list(random_pairs(2)), np.ones(25, np.float32), 0.1)
    assert (grads[0] < 0).all()
    assert (grads[1] > 0).all()


def test_orpo_slope_survives_near_certainty():
    # p = 1 - 1e-5 on both sides: the slope is 1 / (2 (1 - p)), which 1 - exp(log p) in float32 has to 1 digit.
    x = jnp.full(1, -1e-5)
    f = lambda c, r: reference_free_loss(c, r, beta=1.0, nll_coeff=0.0, loss_type="orpo")[0].sum()
    value, grads = jax.value_and_grad(f, argnums=(0, 1))(x, x)
    np.testing.assert_allclose(value, np.log(2.0), rtol=1e-5)
    np.testing.assert_allclose(np.ravel(grads), np.array([-0.5, 0.5]) / -np.expm1(-1e-5), rtol=1e-4)


def test_simpo_margin_moves_the_log_two():
    x = jnp.array([-1.0, -3.0])
    losses, _, _ = reference_free_loss(x, x - 0.25, beta=2.0, gamma=0.5, loss_type="simpo")
    np.testing.assert_allclose(losses, np.log(2.0), rtol=1e-6)


def test_simpo_without_margin_is_cpo():
    xs = random_pairs(3)
    simpo = reference_free_loss(*xs, gamma=0.0, loss_type="simpo")
    chex.assert_trees_all_equal(simpo, reference_free_loss(*xs, loss_type="cpo"))


@pytest.mark.parametrize("loss_type", SHAPED)
def test_alphapo_near_0_is_the_logarithm(loss_type):
    xs = random_pairs(4)
    f = lambda alpha: reference_free_loss(*xs, shape_alpha=alpha, loss_type=loss_type)
    chex.assert_trees_all_close(f(1e-6), f(0.0), rtol=1e-4)


def test_chosen_nll_is_added_as_it_is():
    chosen, rejected, nll = random_pairs(5)
    for loss_type in LOSSES:
        f = lambda nll, coeff, kind=loss_type: reference_free_loss(
            chosen, rejected, nll, nll_coeff=coeff, loss_type=kind
        )[0]
        np.testing.assert_allclose(f(nll, 2.0) - f(None, 0.0), 2.0 * nll, rtol=1e-4, atol=1e-4)
    bare = reference_free_loss(chosen, rejected, loss_type="simpo")
    chex.assert_trees_all_equal(
        bare, reference_free_loss(chosen, rejected, nll, nll_coeff=0.0, loss_type="simpo")
    )


@pytest.mark.parametrize("loss_type", LOSSES)
def test_flags_say_what_a_row_reads(loss_type):
    xs = random_pairs(6)
    f = lambda **kwargs: reference_free_loss(*xs, loss_type=loss_type, **kwargs)[0]
    row = LOSSES[loss_type]
    assert bool((f(label_smoothing=0.1) != f(label_smoothing=0.3)).any()) == row.smoothed
    if row.shaped:
        assert bool((f(shape_alpha=0.5) != f()).any())
    else:
        with pytest.raises(ValueError, match="shape_alpha is 0.5.*no reward to shape"):
            f(shape_alpha=0.5)
    if row.needs_nll:
        with pytest.raises(ValueError, match="chosen_nll is None.*nll_coeff to 0"):
            reference_free_loss(*xs[:2], loss_type=loss_type)
    reference_free_loss(*xs[:2], nll_coeff=0.0, loss_type=loss_type)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_rewards_carry_no_gradient(loss_type):
    def total(xs):
        _, chosen, rejected = reference_free_loss(*xs, loss_type=loss_type)
        return (chosen + rejected).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.array(random_pairs(7))), 0.0)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_pairs_do_not_touch_each_other(loss_type):
    xs = random_pairs(8, n=5)
    f = lambda xs: reference_free_loss(*xs, loss_type=loss_type)[0]
    np.testing.assert_allclose(f(xs), np.stack([f(xs[:, i : i + 1])[0] for i in range(5)]), rtol=1e-6)


def test_half_precision():
    xs = [jnp.full(1, x, jnp.bfloat16) for x in (-0.5, -0.75, 0.5)]
    for loss_type in LOSSES:
        got = reference_free_loss(*xs, nll_coeff=NLL_COEFF, gamma=GAMMA, loss_type=loss_type)
        chex.assert_type(got, jnp.float32)
        np.testing.assert_allclose(got[0], reference(xs, loss_type, 0.1, 0.0), rtol=1e-5)


def test_coefficients_may_be_traced():
    xs = random_pairs(9, n=5)
    for loss_type in LOSSES:
        f = lambda beta, nll_coeff, e, kind=loss_type: reference_free_loss(
            *xs, beta=beta, nll_coeff=nll_coeff, label_smoothing=e, gamma=GAMMA, loss_type=kind
        )[0]
        values = jnp.array([0.1, 0.5]), jnp.array([0.0, NLL_COEFF]), jnp.array([0.2, 0.3])
        swept = jax.jit(jax.vmap(f))(*values)
        np.testing.assert_allclose(swept[1], reference(xs, loss_type, 0.5, 0.3), rtol=3e-5, atol=3e-6)
    f = lambda alpha: reference_free_loss(*xs, shape_alpha=alpha, gamma=GAMMA, loss_type="simpo")[1]
    swept = jax.jit(jax.vmap(f))(jnp.array([0.0, 0.5]))
    np.testing.assert_allclose(swept, [0.1 * shaped(np.float64(xs[0]), a) for a in (0, 0.5)], rtol=1e-5)


def test_bad_arguments():
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match="'dpo'; expected one of orpo, cpo"):
        reference_free_loss(x, x, loss_type="dpo")
    for bad in ((x, jnp.zeros(3)), (x, x, jnp.zeros(3)), (x, x, jnp.float32(0.0))):
        with pytest.raises(AssertionError):
            reference_free_loss(*bad, loss_type="simpo")
