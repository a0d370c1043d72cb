"""PPO's losses: hand-made numbers, a float64 reference in value and gradient, and properties."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.ppo import clipped_policy_loss, clipped_value_loss, value_loss

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


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_zero_where_the_clip_binds_and_nowhere_else(seed):
    logprobs, old, advantages = inputs(3, seed, scale=0.8)
    loss = lambda lp: clipped_policy_loss(lp, old, advantages, jnp.array(MASK), (0.2, 0.3))
    grad, metrics = jax.grad(loss, has_aux=True)(jnp.asarray(logprobs))
    ratio, real = np.exp(np.float64(logprobs) - old), MASK > 0
    binds = real & (((ratio < 0.8) & (advantages < 0)) | ((ratio > 1.3) & (advantages > 0)))
    np.testing.assert_array_equal(np.asarray(grad) == 0, binds | ~real)
    np.testing.assert_allclose(metrics["clip_fraction"], binds.sum() / real.sum(), rtol=1e-6)


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


@pytest.mark.parametrize("kind", ["squared", "huber"])
@pytest.mark.parametrize("limit", [0.3, 100.0])
def test_other_value_losses_and_their_gradients(kind, limit, slope_of):
    values, old, returns = inputs(3, 5)

    def reference(v):
        error = np.abs(v - np.float64(returns))
        losses = 0.5 * error**2
        if kind == "huber":
            losses = np.where(error <= limit, losses, limit * (error - 0.5 * limit))
        return (losses * MASK).sum() / MASK.sum()

    ours = lambda v: value_loss(v, dirty(old), dirty(returns), jnp.array(MASK), kind, limit)
    (value, metrics), grad = jax.value_and_grad(ours, has_aux=True)(dirty(values))
    np.testing.assert_allclose(value, reference(np.float64(values)), rtol=1e-5)
    np.testing.assert_allclose(grad, slope_of(reference, values), atol=1e-6)
    explained = clipped_value_loss(dirty(values), dirty(old), dirty(returns), jnp.array(MASK))[1]
    assert metrics["explained_variance"] == explained["explained_variance"]


def test_value_losses_go_by_their_names():
    three = inputs(3, 6)
    chex.assert_trees_all_equal(
        value_loss(*three, jnp.array(MASK), "clipped", 0.3), clipped_value_loss(*three, jnp.array(MASK), 0.3)
    )
    with pytest.raises(ValueError, match="clipped, squared, huber"):
        value_loss(*three, jnp.array(MASK), "l1")


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


@pytest.mark.parametrize("none", [None, 0, 0.0])
def test_dual_clip_of_none_or_0_is_no_limit(none):
    logprobs, old, advantages = inputs(3, 11, scale=2.0)
    run = lambda dual: clipped_policy_loss(logprobs, old, advantages, jnp.array(MASK), dual_clip=dual)
    chex.assert_trees_all_equal(run(none), run(1e9))
    assert run(none)[0] != run(1.5)[0]


def test_settings_may_be_traced_and_a_pair_may_be_a_list():
    logprobs, old, advantages = inputs(3, 12, scale=2.0)
    run = lambda clip, dual: clipped_policy_loss(
        logprobs, old, advantages, jnp.array(MASK), clip, dual_clip=dual
    )[0]
    traced = jax.jit(lambda low, high, dual: run((low, high), dual))
    for dual in (0.0, 1.5):
        np.testing.assert_allclose(traced(0.1, 0.3, dual), run([0.1, 0.3], dual), rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(lambda c: run(c, None))(jnp.array([0.2]))[0], run(0.2, None), rtol=1e-6
    )
    values = jax.jit(lambda c: clipped_value_loss(logprobs, old, advantages, jnp.array(MASK), c)[0])
    np.testing.assert_allclose(
        values(0.3), clipped_value_loss(logprobs, old, advantages, jnp.array(MASK), 0.3)[0], rtol=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
def test_no_gradient_where_the_clip_binds_and_minus_r_a_elsewhere(seed):
    logprobs, old, advantages = inputs(3, seed, scale=0.8)
    loss = lambda lp: clipped_policy_loss(lp, dirty(old), dirty(advantages), jnp.array(MASK))
    grad, metrics = jax.grad(loss, has_aux=True)(dirty(logprobs))
    ratio = np.exp(np.float64(logprobs) - old)
    bound = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert (bound & (MASK > 0)).any() and not grad[bound].any()
    np.testing.assert_allclose(grad, np.where(bound, 0, -ratio * advantages) * MASK / MASK.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_fraction"], (bound * MASK).sum() / MASK.sum(), rtol=1e-6)


def test_no_width_to_clip_keeps_the_whole_on_policy_gradient():
    # Every token sits on the edge of the interval, where min and clip share gradient out instead of choosing.
    logprobs, advantages = inputs(2, 13)
    grad = jax.grad(lambda lp: clipped_policy_loss(lp, logprobs, advantages, jnp.array(MASK), 0.0)[0])
    np.testing.assert_allclose(grad(jnp.array(logprobs)), -advantages * MASK / MASK.sum(), rtol=1e-6)
    # The same for values that have not moved: V - R.
    values = jax.grad(lambda v: clipped_value_loss(v, logprobs, advantages, jnp.array(MASK), 0.0)[0])
    np.testing.assert_allclose(
        values(jnp.array(logprobs)), (logprobs - advantages) * MASK / MASK.sum(), rtol=1e-5, atol=1e-7
    )


def test_values_inside_the_range_never_count_as_clipped():
    # old + (new - old) is not new: by rounding alone, one value in ten here would count.
    values, old, returns = np.float32(np.random.default_rng(0).normal(0, 0.02, (3, 40, 40)))
    _, metrics = clipped_value_loss(values, old, returns, jnp.ones((40, 40)))
    assert np.abs(values - old).max() < 0.2 and metrics["value_clip_fraction"] == 0.0


@pytest.mark.parametrize("loss", [clipped_policy_loss, clipped_value_loss])
def test_more_padding_changes_nothing(loss):
    """Columns and rows of NaN around the same tokens leave the value, the metrics and the gradient as they are."""
    arrays = [dirty(x) for x in inputs(3, 14)]
    wider = lambda x, fill: jnp.pad(x, ((1, 2), (0, 3)), constant_values=fill)
    run = lambda mask, *x: jax.value_and_grad(lambda first: loss(first, *x[1:], mask), has_aux=True)(x[0])
    (narrow, narrow_grad) = run(jnp.array(MASK), *arrays)
    (wide, wide_grad) = run(wider(jnp.array(MASK), 0), *[wider(x, jnp.nan) for x in arrays])
    chex.assert_trees_all_close(narrow, wide, rtol=1e-6)
    np.testing.assert_allclose(wider(narrow_grad, 0), wide_grad, rtol=1e-6)


@pytest.mark.parametrize("loss", [clipped_policy_loss, clipped_value_loss])
def test_parts_weighted_by_their_tokens_add_up_to_the_whole(loss):
    """What accumulation relies on: rows of 4, 2 and 0 tokens, one at a time."""
    arrays = [jnp.array(x) for x in inputs(3, 15)]
    run = lambda mask, *x: jax.value_and_grad(lambda first: loss(first, *x[1:], mask)[0])(x[0])
    whole, whole_grad = run(jnp.array(MASK), *arrays)
    value, grads = 0.0, []
    for b in range(len(MASK)):
        part, grad = run(jnp.array(MASK[b : b + 1]), *[x[b : b + 1] for x in arrays])
        value += part * MASK[b].sum()
        grads.append(grad * MASK[b].sum())
    np.testing.assert_allclose(value / MASK.sum(), whole, rtol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(grads) / MASK.sum(), whole_grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("loss", [clipped_policy_loss, clipped_value_loss])
def test_half_precision_inputs_reduce_in_float32(loss):
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs(3, 16)]
    value, metrics = loss(*arrays, jnp.array(MASK, bool))
    assert all(x.dtype == jnp.float32 for x in (value, *metrics.values()))
    chex.assert_trees_all_equal(
        (value, metrics), loss(*[x.astype(jnp.float32) for x in arrays], jnp.array(MASK))
    )


def test_the_ratio_stops_at_20_nats():
    # 30 nats above, A = -1: a cost of exp(20), and no gradient past the limit.
    loss = lambda lp: clipped_policy_loss(lp, jnp.zeros((1, 1)), -jnp.ones((1, 1)), jnp.ones((1, 1)))
    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.full((1, 1), 30.0))
    np.testing.assert_allclose([value, metrics["ratio_mean"]], np.exp(20.0), rtol=1e-5)
    assert grad == 0.0
    np.testing.assert_allclose(
        jax.grad(lambda lp: loss(lp)[0])(jnp.full((1, 1), 19.0)), np.exp(19.0), rtol=1e-5
    )
