"""How many labels are wrong, from how often a reward model is contradicted where it is sure.

P(the label prefers the first) = eps + (1 - 2 eps) sigmoid(a (score of the first - score of the second)): a label is
turned round with probability eps, and `a` puts scores into log-odds. Both are fitted by maximum likelihood. Knows
arrays only."""

import numpy as np

SCALES = np.geomspace(1e-3, 1e3, 241)  # of a, in units of 1 / the median margin
EPSILONS = np.linspace(0.0, 0.495, 100)
DROP = 1.92  # nats of log-likelihood: half the 95% quantile of chi-squared with one degree of freedom
TOLD = 0.25  # an interval wider than this tells nothing


def label_noise(margin, weights=None) -> dict | None:
    """{"value", "low", "high": of eps, by profile likelihood; "scale": a; "told": whether the interval is narrow enough
    to mean anything}; None where margins do not vary.

    What is found is an upper bound: a model that is sure and wrong looks like a label that is wrong.
    Args:
      margin: [N], score of the preferred minus that of the other, on pairs that the model was not trained on.
      weights: [N] in [0, 1], 0 where the label itself says that it is a coin; None: 1.
    """
    margin = np.asarray(margin, np.float64)
    weights = np.ones(len(margin)) if weights is None else np.asarray(weights, np.float64)
    margin, weights = margin[weights > 0], weights[weights > 0]
    if not np.abs(margin).max(initial=0) > 0:
        return None
    scales = SCALES / np.median(np.abs(margin[margin != 0]))
    p = 1 / (1 + np.exp(-np.clip(scales[:, None] * margin, -500, 500)))  # [A, N]
    likelihood = np.array([np.log(np.maximum(e + (1 - 2 * e) * p, 1e-300)) @ weights for e in EPSILONS])
    profile = likelihood.max(1)
    best = int(profile.argmax())
    inside = EPSILONS[profile >= profile[best] - DROP]
    low, high = float(inside.min()), float(inside.max())
    return {
        "value": float(EPSILONS[best]),
        "low": low,
        "high": high,
        "scale": float(scales[likelihood[best].argmax()]),
        "told": high - low <= TOLD,
    }


def scale_of(margin, labels=None) -> float:
    """The number a that makes sigmoid(a * margin) fit the labels best, of labels without noise; 1 if none does.
    labels: [N], the probability that the one with the margin is the better; None: 1."""
    margin = np.asarray(margin, np.float64)
    if not len(margin) or not np.abs(margin).max() > 0:
        return 1.0
    scales = SCALES / np.median(np.abs(margin[margin != 0]))
    right = np.ones(len(margin)) if labels is None else np.asarray(labels, np.float64)
    loss = lambda x: right @ softplus(-x) + (1 - right) @ softplus(x)
    return float(scales[np.array([loss(a * margin) for a in scales]).argmin()])


def softplus(x):
    """log(1 + e^x), [N] nats: the loss of a pair whose margin is -x."""
    return np.logaddexp(0.0, x)
