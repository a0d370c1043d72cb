"""How much of a verbosity reward to take off each aspect so that the two no longer go together.

Knows numbers on reference samples; no model. Source: Wang et al. 2024 (ArmoRM), arXiv:2406.12845, section 2.2: rewards
r_k - penalty_k * v, whose rank correlation with v is 0."""

import numpy as np

CORRELATIONS = ("pearson", "spearman")


def verbosity_penalties(aspects, verbosity, kind="spearman"):
    """[K] float64 penalties, units of an aspect a unit of verbosity. On the host: it sorts.

    Args:
      aspects: [N, K] rewards of reference samples. verbosity: [N], of the same samples.
      kind: pearson, in closed form; spearman, by bisection: the correlation falls in steps as the penalty grows, so it
        ends at the step nearest 0. An aspect, or a verbosity, that does not vary gets the penalty 0.
    Raises: ValueError for another kind or shapes that do not fit.
    """
    aspects, verbosity = np.asarray(aspects, np.float64), np.asarray(verbosity, np.float64)
    if kind not in CORRELATIONS or aspects.ndim != 2 or verbosity.shape != aspects.shape[:1]:
        raise ValueError(f"{kind!r} of aspects {aspects.shape} and verbosity {verbosity.shape}")
    if not np.ptp(verbosity) > 0:
        return np.zeros(aspects.shape[1])
    find = _slope if kind == "pearson" else _crossing
    return np.array([find(aspect, verbosity) if np.ptp(aspect) > 0 else 0.0 for aspect in aspects.T])


def rank_correlation(x, y) -> float:
    """Spearman's, ties at their mean rank; 0 where one of them does not vary."""
    x, y = (_ranks(np.asarray(one, np.float64)) for one in (x, y))
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def _slope(aspect, verbosity):
    centred = verbosity - verbosity.mean()
    return float(centred @ (aspect - aspect.mean()) / (centred @ centred))


def _crossing(aspect, verbosity):
    correlation = lambda penalty: rank_correlation(aspect - penalty * verbosity, verbosity)
    reach = np.std(aspect) / np.std(verbosity)
    low, high = -reach, reach
    while correlation(low) < 0:  # ends: at -inf the ranks are those of verbosity, at +inf the reverse
        low *= 2
    while correlation(high) > 0:
        high *= 2
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if correlation(middle) > 0 else (low, middle)
    return min((low, high), key=lambda penalty: abs(correlation(penalty)))


def _ranks(x):
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - 0.5 * (counts + 1))[inverse]
