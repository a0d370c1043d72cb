"""Penalties after which an aspect no longer goes with verbosity."""

import numpy as np
import pytest

from rlhf_jax.losses.decorrelation import rank_correlation, verbosity_penalties


@pytest.mark.parametrize("seed", range(5))
def test_correlation_vanishes(seed):
    rng = np.random.default_rng(seed)
    verbosity = rng.integers(1, 60, 400).astype(float)
    slopes = rng.normal(size=4) * [0.01, 0.1, 1.0, 10.0]
    aspects = verbosity[:, None] * slopes + rng.normal(size=(400, 4))
    linear = verbosity_penalties(aspects, verbosity, "pearson")
    for k in range(4):
        assert abs(np.corrcoef(aspects[:, k] - linear[k] * verbosity, verbosity)[0, 1]) < 1e-9
    np.testing.assert_allclose(linear, np.polyfit(verbosity, aspects, 1)[0], rtol=1e-9)
    ranked = verbosity_penalties(aspects, verbosity)
    for k in range(4):
        assert abs(rank_correlation(aspects[:, k] - ranked[k] * verbosity, verbosity)) < 2e-3
    np.testing.assert_allclose(ranked, linear, atol=0.02)  # one slope, whichever way it is measured


def test_a_monotone_bend_is_undone_in_ranks():
    """What rises as an exponential of length is left without rank correlation, too."""
    verbosity = np.random.default_rng(0).uniform(0, 8, 300)
    aspect = np.exp(verbosity) + np.random.default_rng(1).normal(size=300)
    (penalty,) = verbosity_penalties(aspect[:, None], verbosity)
    assert abs(rank_correlation(aspect - penalty * verbosity, verbosity)) < 5e-3


def test_by_hand():
    assert rank_correlation([1.0, 2.0, 2.0, 9.0], [0.0, 5.0, 6.0, 7.0]) == pytest.approx(0.9486833)
    assert rank_correlation([1.0, 1.0], [0.0, 1.0]) == 0.0
    # Verbosity itself is an aspect: nothing of it is left. One that does not vary has nothing to lose.
    v = np.array([1.0, 2.0, 4.0])
    for kind in ("pearson", "spearman"):
        found = verbosity_penalties(np.stack([v, 3 * v, np.ones(3)], 1), v, kind)
        np.testing.assert_allclose(found, [1.0, 3.0, 0.0], atol=1e-9)
        assert not verbosity_penalties(v[:, None], np.ones(3), kind).any()
    with pytest.raises(ValueError, match="kendall"):
        verbosity_penalties(v[:, None], v, "kendall")
