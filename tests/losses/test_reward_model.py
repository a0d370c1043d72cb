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


def test_scores_and_margins_of_any_dtype_are_reduced_in_float32():
    for dtype in (jnp.bfloat16, jnp.int32):
        x = jnp.array([[3, 1], [1, 4]], dtype)
        got = rm.pairwise_logsigmoid(x[:, 0], x[:, 1], jnp.array([1, 2], dtype), 0.5)
        assert got.dtype == rm.pairwise_logexp(x[:, 0], x[:, 1]).dtype == jnp.float32
        np.testing.assert_allclose(got, -logsigmoid([1, -5]) + 0.5 * np.array([16, 25]), rtol=1e-6)
        assert rm.plackett_luce(x, jnp.ones((2, 2), bool)).dtype == jnp.float32
        assert rm.regression(x[:, 0], x[:, 1]).dtype == jnp.float32
        assert rm.classification(x, jnp.array([0, 1])).dtype == jnp.float32


def token_level_reference(chosen, rejected, chosen_ids, rejected_ids, pad):
    """With loops, over rows padded on the right."""
    out = []
    for c, r, a, b in zip(chosen, rejected, chosen_ids, rejected_ids, strict=True):
        T = len(a)
        end = max(([*a, pad].index(pad), [*b, pad].index(pad)))
        start = next((t for t in range(T) if a[t] != b[t]), None)
        start, end = (T - 1, T) if start is None else (start, end)
        out.append(-logsigmoid(c[start:end] - r[start:end]).mean())
    return np.array(out)


@pytest.mark.parametrize("seed", range(4))
def test_token_level_against_loops(seed, slope_of):
    rng = np.random.default_rng(seed)
    T, pad = 7, 0
    ids = rng.integers(1, 3, (2, 6, T))
    ids[:, :, 0] = 1  # a shared beginning
    ids[1, 0] = ids[0, 0]  # and a pair that never differs
    lengths = rng.integers(1, T + 1, (2, 6))
    lengths[1, 0] = lengths[0, 0]
    ids = np.where(np.arange(T) < lengths[..., None], ids, pad)
    values = np.float32(rng.normal(0, 2, (2, 6, T)))
    reference = lambda v: token_level_reference(v[0], v[1], ids[0].tolist(), ids[1].tolist(), pad)
    ours = lambda v: rm.token_level_pairwise(v[0], v[1], jnp.array(ids[0]), jnp.array(ids[1]), pad)
    np.testing.assert_allclose(ours(jnp.array(values)), reference(np.float64(values)), rtol=1e-5)
    grad = jax.grad(lambda v: ours(v).sum())(jnp.array(values))
    np.testing.assert_allclose(grad, slope_of(lambda v: reference(v).sum(), values), atol=1e-5)


def test_token_level_pair_that_never_differs_costs_log_2_and_pulls_nowhere():
    """Through one network both sides have the same values, and what is pushed up is pushed down."""
    ids, values = jnp.array([[1, 2, 0, 0]]), jnp.array([[0.3, -1.0, 2.0, 5.0]])
    value, grad = jax.value_and_grad(lambda v: rm.token_level_pairwise(v, v, ids, ids, 0).sum())(values)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert not grad.any()


@pytest.mark.parametrize("delta", [None, 0.5, 2.0])
def test_regression_against_float64(delta, slope_of):
    scores, targets = np.float32(np.random.default_rng(1).normal(0, 2, (2, 20)))

    def reference(s):
        e = s - np.float64(targets)
        if delta is None:
            return e**2
        return np.where(np.abs(e) <= delta, e**2 / 2, delta * (np.abs(e) - delta / 2))

    ours = lambda s: rm.regression(s, jnp.array(targets), delta)
    np.testing.assert_allclose(ours(jnp.array(scores)), reference(np.float64(scores)), rtol=1e-5, atol=1e-6)
    grad = jax.grad(lambda s: ours(s).sum())(jnp.array(scores))
    np.testing.assert_allclose(grad, slope_of(lambda s: reference(s).sum(), scores), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_multi_objective_regression_against_float64(seed, slope_of):
    rng = np.random.default_rng(seed)
    scores, targets = np.float32(rng.normal(0, 2, (2, 5, 4)))
    mask = rng.integers(0, 2, (5, 4))
    mask[0] = 0
    reference = lambda s: ((s - targets) ** 2 * mask).sum(1) / np.maximum(mask.sum(1), 1)
    ours = lambda s: rm.multi_objective_regression(s, jnp.where(mask > 0, targets, jnp.nan), jnp.array(mask))
    np.testing.assert_allclose(ours(jnp.array(scores)), reference(np.float64(scores)), rtol=1e-5, atol=1e-7)
    grad = jax.grad(lambda s: ours(s).sum())(jnp.where(mask > 0, scores, jnp.inf))
    np.testing.assert_allclose(grad, slope_of(lambda s: reference(s).sum(), scores), atol=1e-5)


def test_plackett_luce_leaves_absent_columns_out():
    """Wherever they stand, and however many: the loss is that of the ones that are there."""
    scores = jnp.array([[1.0, -0.5, 2.0]])
    alone = rm.plackett_luce(scores, jnp.ones((1, 3)))
    nan = jnp.nan
    for row in ([nan, 1.0, -0.5, nan, 2.0], [1.0, -0.5, 2.0, nan, nan], [1.0, nan, nan, -0.5, 2.0]):
        row = jnp.array([row])
        np.testing.assert_allclose(rm.plackett_luce(row, ~jnp.isnan(row)), alone, rtol=1e-6)
    # The probabilities of all rankings sum to 1.
    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    total = sum(
        float(jnp.exp(-rm.plackett_luce(scores[:, jnp.array(o)], jnp.ones((1, 3))))[0]) for o in orders
    )
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)
