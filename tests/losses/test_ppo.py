"""PPO's losses: hand-made numbers, a float64 reference in value and gradient, and properties."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.ppo import clipped_policy_loss, clipped_value_loss

MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])


def inputs(n, seed, scale=0.4):
    rng = np.random.default_rng(seed)
    return [np.float32(rng.normal(0, scale, MASK.shape)) for _ in range(n)]


def dirty(x, value=jnp.nan):
    return jnp.where(MASK > 0, x, value)


def policy_reference(logprobs, old, advantages, low, high, dual):
    r = np.exp(logprobs - old)
    gain = np.minimum(r * advantages, np.clip(r, 1 - low, 1 + high) * advantages)
    if dual is not None:
        gain = np.where(advantages < 0, np.maximum(gain, dual * advantages), gain)
    return -(gain * MASK).sum() / MASK.sum()


def test_clip_is_pessimistic():
    ratio, advantages = jnp.array([[1.5, 0.5, 0.5, 1.5]]), jnp.array([[1.0, 1.0, -1.0, -1.0]])
    # min(r A, clip(r) A): 1.2, 0.5, -0.8, -1.5. Sum -0.6, so the loss is 0.6 / 4.
    loss = lambda lp: clipped_policy_loss(lp, jnp.zeros((1, 4)), advantages, jnp.ones((1, 4)))
    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.log(ratio))
    np.testing.assert_allclose(value, 0.15, rtol=1e-5)
    # A clipped token has no gradient; any other has -r A / 4. With max for min the last two would change places.
    np.testing.assert_allclose(grad, [[0.0, -0.125, 0.0, 0.375]], rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_fraction"], 0.5)
    np.testing.assert_allclose(metrics["ratio_mean"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["ratio_max_gap"], 0.5, rtol=1e-6)
    k3 = (np.array([0.5, -0.5, -0.5, 0.5]) - np.log([1.5, 0.5, 0.5, 1.5])).mean()
    np.testing.assert_allclose(metrics["approx_kl"], k3, rtol=1e-5)


@pytest.mark.parametrize("clip, dual", [(0.2, None), ((0.2, 0.28), None), (0.2, 3.0), ((0.1, 0.3), 1.5)])
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient(clip, dual, seed, slope_of):
    logprobs, old, advantages = inputs(3, seed, scale=0.8)
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    reference = lambda lp: policy_reference(lp, np.float64(old), np.float64(advantages), low, high, dual)
    ours = lambda lp: clipped_policy_loss(
        lp, dirty(old), dirty(advantages, jnp.inf), jnp.array(MASK), clip, dual_clip=dual
    )[0]
    value, grad = jax.value_and_grad(ours)(dirty(logprobs))
    np.testing.assert_allclose(value, reference(np.float64(logprobs)), rtol=1e-5)
    np.testing.assert_allclose(grad, slope_of(reference, logprobs), atol=1e-6)


def test_dual_clip_bounds_what_a_bad_token_costs():
    # r = 10, A = -1: 10 without, 3 with, and no gradient then.
    loss = lambda lp: clipped_policy_loss(
        lp, jnp.zeros((1, 1)), -jnp.ones((1, 1)), jnp.ones((1, 1)), dual_clip=3.0
    )[0]
    value, grad = jax.value_and_grad(loss)(jnp.log(jnp.full((1, 1), 10.0)))
    assert value == 3.0 and grad == 0.0


def test_on_policy_gradient_is_minus_the_advantage():
    logprobs, advantages = inputs(2, 5)
    grad = jax.grad(
        lambda lp: clipped_policy_loss(lp, dirty(logprobs), dirty(advantages), jnp.array(MASK))[0]
    )
    np.testing.assert_allclose(grad(dirty(logprobs)), -advantages * MASK / MASK.sum(), rtol=1e-5)


def test_old_logprobs_and_advantages_carry_no_gradient():
    arrays = [dirty(x) for x in inputs(3, 6)]
    grads = jax.grad(lambda old, adv: clipped_policy_loss(arrays[0], old, adv, jnp.array(MASK))[0], (0, 1))
    assert not any(g.any() for g in grads(*arrays[1:]))


@pytest.mark.parametrize("gap", [1e4, -1e4, np.inf])
def test_huge_ratios_stay_finite(gap):
    advantages = jnp.array([[1.0, -1.0]])
    loss = lambda lp: clipped_policy_loss(lp, jnp.zeros((1, 2)), advantages, jnp.ones((1, 2)))[0]
    value, grad = jax.value_and_grad(loss)(jnp.full((1, 2), gap, jnp.float32))
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_nothing_real_is_a_loss_of_0():
    nan = jnp.full((2, 3), jnp.nan)
    loss = lambda lp: clipped_policy_loss(lp, nan, nan, jnp.zeros((2, 3)))[0]
    assert jax.value_and_grad(loss)(nan)[0] == 0 and not jax.grad(loss)(nan).any()
    assert jax.grad(lambda v: clipped_value_loss(v, nan, nan, jnp.zeros((2, 3)))[0])(nan).sum() == 0


@pytest.mark.parametrize("seed", range(3))
def test_padding_cannot_matter(seed):
    logprobs, old, advantages = inputs(3, seed)
    policy = jax.value_and_grad(lambda lp, o, a: clipped_policy_loss(lp, o, a, jnp.array(MASK)), has_aux=True)
    value = jax.value_and_grad(lambda v, o, r: clipped_value_loss(v, o, r, jnp.array(MASK)), has_aux=True)
    for f in (policy, value):
        clean = f(*(dirty(x, 0.0) for x in (logprobs, old, advantages)))
        chex.assert_trees_all_equal(clean, f(*(dirty(x) for x in (logprobs, old, advantages))))


def test_value_loss_by_hand():
    # old 0, return 1, clip 0.2. 0.5: clipped to 0.2, errors 0.25 and 0.64, the larger counts, no gradient.
    # 0.1: inside, 0.81, gradient V - R. 1.5: errors 0.25 and 0.64. -0.5: 2.25 and 1.44, gradient -1.5.
    loss = lambda v: clipped_value_loss(v, jnp.zeros((1, 4)), jnp.ones((1, 4)), jnp.ones((1, 4)))
    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.array([[0.5, 0.1, 1.5, -0.5]]))
    np.testing.assert_allclose(value, 0.5 * (0.64 + 0.81 + 0.64 + 2.25) / 4, rtol=1e-6)
    np.testing.assert_allclose(grad, [[0.0, -0.9 / 4, 0.0, -1.5 / 4]], rtol=1e-6)
    assert metrics["value_clip_fraction"] == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_value_loss_and_gradient(seed, slope_of):
    values, old, returns = inputs(3, seed)

    def reference(v):
        clipped = old + np.clip(v - old, -0.3, 0.3)
        return 0.5 * (np.maximum((v - returns) ** 2, (clipped - returns) ** 2) * MASK).sum() / MASK.sum()

    ours = lambda v: clipped_value_loss(v, dirty(old), dirty(returns), jnp.array(MASK), 0.3)[0]
    value, grad = jax.value_and_grad(ours)(dirty(values))
    np.testing.assert_allclose(value, reference(np.float64(values)), rtol=1e-5)
    np.testing.assert_allclose(grad, slope_of(reference, values), atol=1e-6)


def test_explained_variance():
    _, old, returns = inputs(3, 9)
    explained = lambda o, r: clipped_value_loss(dirty(o), dirty(o), dirty(r), jnp.array(MASK))[1][
        "explained_variance"
    ]
    real = MASK > 0
    expected = 1 - np.var(np.float64(returns - old)[real]) / np.var(np.float64(returns)[real])
    np.testing.assert_allclose(explained(old, returns), expected, rtol=1e-4)
    np.testing.assert_allclose(
        explained(returns + 2, returns), 1.0, rtol=1e-5
    )  # a constant error explains all
    assert explained(old, np.full(MASK.shape, 0.5, np.float32)) == 0.0  # nothing to explain


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        clipped_policy_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros((2, 1)), jnp.ones((2, 3)))
    with pytest.raises(AssertionError):
        clipped_value_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros(2), jnp.ones((2, 3)))
