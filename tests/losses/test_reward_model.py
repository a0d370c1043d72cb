"""Reward-model losses against float64 formulae, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import reward_model as rm

SCORES = np.float32([[0.3, -1.2], [2.0, 2.0], [-4.0, 5.0], [30.0, -30.0], [-30.0, 30.0]]).T


def logsigmoid(x):
    return -np.logaddexp(0.0, -np.float64(x))


@pytest.mark.parametrize("margin", [None, np.float32([0.0, 1.0, 0.5, 3.0, 0.1])])
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_pairwise_logsigmoid(margin, center, slope_of):
    reference = lambda x: (
        -logsigmoid(x[0] - x[1] - (0 if margin is None else margin)) + center * (np.float64(x[0]) + x[1]) ** 2
    )
    ours = lambda x: rm.pairwise_logsigmoid(x[0], x[1], None if margin is None else jnp.array(margin), center)
    np.testing.assert_allclose(ours(jnp.array(SCORES)), reference(SCORES), rtol=1e-5, atol=1e-7)
    grad = jax.grad(lambda x: ours(x).sum())(jnp.array(SCORES))
    np.testing.assert_allclose(grad, slope_of(lambda x: reference(x).sum(), SCORES), atol=1e-5)


def test_pairwise_logexp_is_the_same_number():
    chosen, rejected = jnp.array(SCORES)
    np.testing.assert_allclose(
        rm.pairwise_logexp(chosen, rejected), -logsigmoid(SCORES[0] - SCORES[1]), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        rm.pairwise_logexp(chosen, rejected), rm.pairwise_logsigmoid(chosen, rejected), rtol=1e-6
    )


@pytest.mark.parametrize("loss", [rm.pairwise_logexp, rm.pairwise_logsigmoid])
def test_pairwise_at_extremes(loss):
    value, grad = jax.value_and_grad(lambda c: loss(c, jnp.zeros(2)).sum())(jnp.array([1e4, -1e4]))
    np.testing.assert_allclose(value, 1e4)
    np.testing.assert_allclose(grad, [0.0, -1.0])


def test_token_level_by_hand():
    pad = 9
    chosen_ids = jnp.array([[1, 2, 3, 4, 9, 9], [1, 2, 3, 9, 9, 9], [1, 2, 9, 9, 9, 9], [5, 1, 1, 1, 1, 1]])
    rejected_ids = jnp.array([[1, 2, 5, 9, 9, 9], [1, 7, 3, 4, 5, 9], [1, 2, 9, 9, 9, 9], [6, 1, 1, 1, 1, 1]])
    # Differ at 2, longer ends at 4; at 1, ends at 5; never: the last column; at 0, no pad: 6.
    spans = [(2, 4), (1, 5), (5, 6), (0, 6)]
    rng = np.random.default_rng(0)
    chosen, rejected = np.float32(rng.normal(size=(2, 4, 6)))
    chosen[2, 5] = rejected[2, 5]
    expected = [-logsigmoid(chosen[b, s:e] - rejected[b, s:e]).mean() for b, (s, e) in enumerate(spans)]
    inside = np.zeros((4, 6), bool)
    for b, (s, e) in enumerate(spans):
        inside[b, s:e] = True
    dirty = [jnp.where(inside, x, jnp.nan) for x in (chosen, rejected)]
    loss = lambda c, r: rm.token_level_pairwise(c, r, chosen_ids, rejected_ids, pad)
    np.testing.assert_allclose(loss(*dirty), expected, rtol=1e-5)
    np.testing.assert_allclose(expected[2], np.log(2), rtol=1e-6)
    grad = jax.grad(lambda c: loss(c, dirty[1]).sum())(dirty[0])
    counts = np.array([e - s for s, e in spans])[:, None]
    slope = -1 / (1 + np.exp(np.float64(chosen) - rejected)) / counts
    np.testing.assert_allclose(grad, np.where(inside, slope, 0.0), rtol=1e-5)


def test_classification():
    logits = np.float32([[0.2, 1.5], [3.0, -2.0], [1e4, 0.0]])
    labels = np.array([1, 1, 0])
    z = np.float64(logits)
    expected = np.logaddexp(z[:, 0], z[:, 1]) - z[range(3), labels]
    np.testing.assert_allclose(
        rm.classification(jnp.array(logits), jnp.array(labels)), expected, rtol=1e-5, atol=1e-6
    )
    grad = jax.grad(lambda x: rm.classification(x, jnp.array(labels)).sum())(jnp.array(logits))
    p = np.exp(z - np.logaddexp(z[:, :1], z[:, 1:]))
    np.testing.assert_allclose(grad, p - np.eye(2)[labels], atol=1e-6)


def test_regression():
    scores, targets = jnp.array([1.0, 2.5, -1.0]), jnp.array([0.5, 0.5, -1.0])
    np.testing.assert_allclose(rm.regression(scores, targets), [0.25, 4.0, 0.0])
    np.testing.assert_allclose(rm.regression(scores, targets, delta=1.0), [0.125, 1.5, 0.0])
    grad = jax.grad(lambda s: rm.regression(s, targets, delta=1.0).sum())(scores)
    np.testing.assert_allclose(grad, [0.5, 1.0, 0.0])


def test_multi_objective_regression_skips_missing_labels():
    scores = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    targets = jnp.array([[0.0, jnp.nan, 1.0], [0.5, 1.0, 2.0], [jnp.nan, jnp.nan, jnp.nan]])
    mask = jnp.array([[1, 0, 1], [1, 1, 1], [0, 0, 0]])
    loss = lambda s: rm.multi_objective_regression(s, targets, mask)
    np.testing.assert_allclose(loss(scores), [2.5, 4.25 / 3, 0.0], rtol=1e-6)
    grad = jax.grad(lambda s: loss(s).sum())(scores)
    np.testing.assert_allclose(grad, [[1.0, 0, 2.0], [-1 / 3, 0, -4 / 3], [0, 0, 0]], rtol=1e-6)


def plackett_luce_reference(scores, mask):
    total = []
    for row, kept in zip(scores, mask, strict=True):
        s = np.float64(row)[np.array(kept) > 0]
        total.append(sum(np.logaddexp.reduce(s[i:]) - s[i] for i in range(len(s))))
    return np.array(total)


def test_plackett_luce(slope_of):
    scores = np.float32(np.random.default_rng(0).normal(0, 3, (6, 4)))
    scores[1] *= 1000
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    dirty = jnp.where(mask > 0, scores, jnp.nan)
    loss = lambda s: rm.plackett_luce(s, jnp.array(mask))
    np.testing.assert_allclose(loss(dirty), plackett_luce_reference(scores, mask), rtol=1e-5, atol=1e-6)
    grad = jax.grad(lambda s: loss(s).sum())(dirty)
    np.testing.assert_allclose(
        grad, slope_of(lambda s: plackett_luce_reference(s, mask).sum(), scores), atol=1e-5
    )
    np.testing.assert_allclose(grad.sum(1), 0, atol=1e-5)  # a shift of all scores changes nothing


def test_plackett_luce_of_two_is_the_pairwise_loss():
    got = rm.plackett_luce(jnp.array(SCORES.T), jnp.ones((5, 2)))
    np.testing.assert_allclose(got, rm.pairwise_logsigmoid(*jnp.array(SCORES)), rtol=1e-5, atol=1e-6)
