"""KL estimators against float64 and against the true KL in expectation; the adaptive controller by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.kl import adaptive_kl_update, kl_budget_update, kl_estimate

FORMULA = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: np.exp(-d) - 1 + d}
SLOPE = {"k1": lambda d: d * 0 + 1, "k2": lambda d: d, "k3": lambda d: 1 - np.exp(-d)}
GAPS = np.array([[0.0, 1e-3, -1e-3, 0.5], [-0.5, 4.0, -4.0, 30.0]])


@pytest.mark.parametrize("kind", FORMULA)
def test_value_and_gradient(kind):
    ref = np.full(GAPS.shape, -2.0)
    got = kl_estimate(jnp.float32(ref + GAPS), jnp.float32(ref), kind)
    np.testing.assert_allclose(got, FORMULA[kind](GAPS), rtol=1e-5, atol=2e-7)
    grad = jax.grad(lambda lp: kl_estimate(lp, jnp.float32(ref), kind).sum())(jnp.float32(ref + GAPS))
    np.testing.assert_allclose(grad, SLOPE[kind](GAPS), rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased_over_every_token_of_a_vocabulary(kind):
    logp, ref = (jax.nn.log_softmax(jax.random.normal(jax.random.key(i), (50,))) for i in (0, 1))
    exact = float((jnp.exp(logp) * (logp - ref)).sum())
    np.testing.assert_allclose((jnp.exp(logp) * kl_estimate(logp, ref, kind)).sum(), exact, rtol=1e-4)
    assert exact > 0.5


def test_k2_and_k3_are_never_negative_and_bfloat16_is_widened():
    logp = jax.random.normal(jax.random.key(0), (100,))
    ref = logp + 1e-3 * jax.random.normal(jax.random.key(1), (100,))
    for kind in ("k2", "k3"):
        assert float(kl_estimate(logp, ref, kind).min()) >= -1e-9
    assert kl_estimate(logp.astype(jnp.bfloat16), ref.astype(jnp.bfloat16)).dtype == jnp.float32


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'kl'; expected one of k1, k2, k3"):
        kl_estimate(jnp.zeros(2), jnp.zeros(2), "kl")


@pytest.mark.parametrize(
    "observed, expected",
    [
        (6.0, 0.15),  # on target
        (6.6, 0.15 * (1 + 0.1 * 64 / 10_000)),
        (600.0, 0.15 * (1 + 0.2 * 64 / 10_000)),  # clipped
        (0.0, 0.15 * (1 - 0.2 * 64 / 10_000)),
        (-5.0, 0.15 * (1 - 0.2 * 64 / 10_000)),  # an estimate may be negative
        (np.inf, 0.15 * (1 + 0.2 * 64 / 10_000)),
        (np.nan, 0.15),
    ],
)
def test_controller(observed, expected):
    got = adaptive_kl_update(
        jnp.float32(0.15), jnp.float32(observed), target=6.0, horizon=10_000, batch_size=64
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_controller_never_goes_below_0():
    got = adaptive_kl_update(jnp.float32(0.1), jnp.float32(0.0), target=1.0, horizon=10, batch_size=1000)
    assert float(got) == 0.0


def test_controller_finds_the_coefficient_that_holds_the_target():
    """A policy whose KL is 2 / kl_coeff nats: the coefficient for 4 nats is 0.5."""
    coeff = jnp.float32(0.01)
    step = jax.jit(lambda c: adaptive_kl_update(c, 2.0 / c, target=4.0, horizon=1000, batch_size=100))
    for _ in range(1000):
        coeff = step(coeff)
    np.testing.assert_allclose(coeff, 0.5, rtol=1e-3)


@pytest.mark.parametrize(
    "observed, before, expected",
    [
        (4.0, 4.0, 0.0),  # on target
        (6.0, 4.0, 0.5 + 5 * 0.5),  # the error, and five times what it grew by
        (0.0, 0.0, -1.0),  # the first step: no trend
        (-3.0, 0.0, -1.0),  # an estimate may be negative
        (2.0, 0.0, -0.5 + 5 * 0.5),  # half way, and coming fast
        (1e6, 4.0, 2.0 + 5 * 2.0),  # bounded
        (np.nan, 3.0, 0.0),
        (np.inf, 3.0, 0.0),
    ],
)
def test_budget(observed, before, expected):
    new, kept = kl_budget_update(
        jnp.float32(0.1), jnp.float32(observed), target=4.0, rate=0.2, previous_kl=jnp.float32(before)
    )
    np.testing.assert_allclose(new, 0.1 * np.exp(0.2 * expected), rtol=1e-5)
    assert float(kept) == (observed if np.isfinite(observed) else before)


def test_budget_keeps_its_bounds():
    step = lambda coeff, kl: kl_budget_update(
        jnp.float32(coeff), kl, target=1.0, rate=1.0, previous_kl=kl, bounds=(0.02, 0.4)
    )[0]
    assert float(step(0.03, 0.0)) == np.float32(0.02) and float(step(0.3, 99.0)) == np.float32(0.4)


@pytest.mark.parametrize("start", [0.005, 0.05, 0.5])
@pytest.mark.parametrize("target", [1.0, 6.0])
@pytest.mark.parametrize("rate", [0.1, 0.2])
def test_budget_ends_at_its_target_where_the_policy_answers_late(start, target, rate):
    """KL goes a fifth of the way to 0.4 / kl_coeff a step, and is observed with a deviation of 15 %."""
    rng = np.random.default_rng(0)
    step = jax.jit(
        lambda c, kl, before: kl_budget_update(c, kl, target=target, rate=rate, previous_kl=before)
    )
    coeff, kl, before, seen = jnp.float32(start), 0.0, jnp.float32(0.0), []
    for _ in range(100):
        coeff, before = step(coeff, kl * (1 + 0.15 * rng.normal()), before)
        kl += 0.2 * (0.4 / float(coeff) - kl)
        seen.append(kl)
    np.testing.assert_allclose(np.mean(seen[-20:]), target, rtol=0.1)
    assert max(seen[60:]) < 1.6 * target


@pytest.mark.parametrize("kind", FORMULA)
def test_gradient_of_the_reference_by_differences(kind, slope_of):
    logp = np.random.default_rng(2).normal(-2, 1, (2, 5))
    ref = np.float32(logp + np.random.default_rng(3).normal(0, 1, (2, 5)))
    logp = np.float32(logp)
    got = jax.grad(lambda r: kl_estimate(jnp.array(logp), r, kind).sum())(jnp.array(ref))
    expected = slope_of(lambda r: FORMULA[kind](np.float64(logp) - r).sum(), ref)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_the_same_log_probabilities_are_0_for_every_kind():
    logp = jnp.array([[-1e4, -0.1, -30.0]])
    for kind in FORMULA:
        assert not kl_estimate(logp, logp, kind).any()


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        kl_estimate(jnp.zeros((2, 3)), jnp.zeros(3))
