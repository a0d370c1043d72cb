"""Mixtures of rewards against numbers made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.losses.advantages import group_relative
from rlhf_jax.rewards.mixture import Component, mix

A = jnp.array([[1.0, 3.0], [5.0, 7.0]])
B = jnp.array([[0.0, 1.0], [1.0, 1.0]])
NAN = float("nan")


def test_plain_weighted_sum_and_what_is_logged():
    total, metrics = mix([Component("a", 2.0), Component("b", -1.0)], [A, B])
    np.testing.assert_allclose(total, [[2, 5], [9, 13]])
    expected = {"reward/a": 4, "reward/a_std": 5**0.5, "reward/b": 0.75, "reward/b_std": 0.75 * 3**-0.5}
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)


@pytest.mark.parametrize("over", ["group", "batch"])
def test_normalised_by_group_and_batch(over):
    scores = jax.random.normal(jax.random.key(0), (3, 4)) * 5 + 2
    total, metrics = mix([Component("a", normalise=over)], [scores])
    x = np.float64(scores)
    axis = 1 if over == "group" else None
    expected = (x - x.mean(axis, keepdims=True)) / (x.std(axis, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["reward/a"], x.mean(), rtol=1e-5)  # logged before normalising
    if over == "group":
        np.testing.assert_allclose(total, group_relative(scores, "group"), rtol=1e-5)


def test_normalise_each_then_sum_is_not_sum_then_normalise():
    # GDPO, arXiv:2601.05242: a rare reward keeps its say next to one of a hundred times its size.
    large, small = A * 100, B
    each, _ = mix([Component("a", normalise="batch"), Component("b", normalise="batch")], [large, small])
    plain, _ = mix([Component("a"), Component("b")], [large, small])
    np.testing.assert_allclose(plain, large + small)
    a, b = ((x - x.mean()) / x.std(ddof=1) for x in (np.float64(large), np.float64(small)))
    np.testing.assert_allclose(each, a + b, atol=1e-3)


def test_gdpo_is_group_here_and_batch_in_the_algorithm():
    """arXiv:2601.05242: each reward by its group, their weighted sum by the batch. No reward's size matters."""
    x, y = (np.random.default_rng(seed).normal(3, 2, (4, 5)) for seed in (0, 1))
    components = [Component("x", 2.0, "group"), Component("y", 1.0, "group")]
    group = lambda r: (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4)
    total = 2 * group(x) + group(y)
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    for size in (1.0, 100.0):
        mixed, _ = mix(components, [jnp.float32(x), jnp.float32(size * y)])
        np.testing.assert_allclose(group_relative(mixed, "batch"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("over", ["group", "batch"])
def test_equal_scores_are_exactly_zero_and_one_alone_too(over):
    seven = jnp.full((2, 7), 0.1)
    np.testing.assert_array_equal(mix([Component("a", normalise=over)], [seven])[0], 0.0)
    np.testing.assert_array_equal(mix([Component("a", normalise=over)], [jnp.ones((1, 1)) * 3])[0], 0.0)


def test_clipped_after_normalising_and_before_weighing():
    total, metrics = mix([Component("a", 2.0, clip_low=2.0, clip_high=5.0)], [A])
    np.testing.assert_allclose(total, [[4, 6], [10, 10]])
    np.testing.assert_allclose(metrics["reward/a"], 4.0)
    total, _ = mix([Component("a", normalise="group", clip_high=0.0)], [A])
    np.testing.assert_allclose(total, [[-(0.5**0.5), 0]] * 2, rtol=1e-3)


@pytest.mark.parametrize("over", ["none", "group", "batch"])
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
def test_what_could_not_be_scored_stays_nan_and_touches_no_statistic(over, bad):
    components = [Component("a", normalise=over, clip_low=-3.0, clip_high=9.0), Component("b")]
    scores = A.at[0, 1].set(bad)
    total, metrics = mix(components, [scores, B])
    assert np.isnan(total).tolist() == [[False, True], [False, False]]
    np.testing.assert_allclose(metrics["reward/a"], 13 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/a_std"], np.std([1, 5, 7]), rtol=1e-6)
    np.testing.assert_allclose(metrics["reward/b"], 0.75)
    x, rest = np.array([1.0, 5.0, 7.0]), np.array([0.0, 1.0, 1.0])
    by_group = np.array([0.0, *group_relative(A, "group")[1]])
    expected = {"none": x, "batch": (x - x.mean()) / (x.std(ddof=1) + 1e-4), "group": by_group}[over]
    np.testing.assert_allclose(total[~np.isnan(total)], expected + rest, rtol=1e-4)


@pytest.mark.parametrize("over", ["group", "batch"])
def test_rows_that_fill_the_batch_touch_no_statistic(over):
    mask = jnp.array([[1, 1], [1, 1], [0, 0]])
    filled = jnp.concatenate([A, jnp.array([[1e6, NAN]])])
    short, short_metrics = mix([Component("a", normalise=over)], [A])
    total, metrics = mix([Component("a", normalise=over)], [filled], mask)
    np.testing.assert_allclose(total[:2], short, rtol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], short_metrics[name], rtol=1e-6)


def test_weight_zero_measures_and_no_more():
    total, metrics = mix([Component("a"), Component("gold", 0.0)], [A, B * NAN])
    np.testing.assert_allclose(total, A)
    assert metrics["reward/gold"] == 0  # of nothing


def test_under_jit_and_from_integers():
    components = [Component("a", 0.5), Component("b", normalise="group")]
    scores = [jnp.array([[1, 2], [3, 5]]), B]
    total, _ = jax.jit(lambda *x: mix(components, x))(*scores)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, mix(components, scores)[0], rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"weight": NAN},
        {"normalise": "prompt"},
        {"clip_low": 1.0, "clip_high": 1.0},
        {"clip_high": NAN},
    ],
)
def test_components_are_checked(settings):
    with pytest.raises(InputError, match="reward 'a'"):
        Component("a", **settings)


def test_names_and_numbers_are_checked():
    with pytest.raises(ValueError, match="a name of its own"):
        mix([Component("a"), Component("a")], [A, B])
    with pytest.raises(ValueError):
        mix([Component("a")], [A, B])
