"""The rows of the DPO family as plain float64 formulae, and central differences of them."""

import numpy as np

TAU, SMOOTHING = 0.05, 0.15


def sigma(x):
    return 1.0 / (1.0 + np.exp(-x))


def cdpo(h, e):
    return -(1 - e) * np.log(sigma(h)) - e * np.log(sigma(-h))


# c, r: log ratios of chosen and rejected; b: beta; e: label smoothing; p: the four log-probabilities.
REFERENCE = {
    "sigmoid": lambda c, r, b, e, p: cdpo(b * (c - r), e),
    "hinge": lambda c, r, b, e, p: np.maximum(0.0, 1 - b * (c - r)),
    "ipo": lambda c, r, b, e, p: ((c - r) - 1 / (2 * b)) ** 2,
    "ipo_sum": lambda c, r, b, e, p: ((c - r) - 1 / (2 * b)) ** 2,
    "robust": lambda c, r, b, e, p: (
        (-(1 - e) * np.log(sigma(b * (c - r))) + e * np.log(sigma(-b * (c - r)))) / (1 - 2 * e)
    ),
    "exo_pair": lambda c, r, b, e, p: (
        sigma(b * (c - r)) * (np.log(sigma(b * (c - r))) - np.log(1 - e))
        + sigma(-b * (c - r)) * (np.log(sigma(-b * (c - r))) - np.log(e))
    ),
    "nca_pair": lambda c, r, b, e, p: (
        -np.log(sigma(b * c)) - 0.5 * np.log(sigma(-b * c)) - 0.5 * np.log(sigma(-b * r))
    ),
    "bco_pair": lambda c, r, b, e, p: -np.log(sigma(b * c)) - np.log(sigma(-b * r)),
    "sppo_hard": lambda c, r, b, e, p: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "aot": lambda c, r, b, e, p: cdpo(b * (np.sort(p[0] - p[1]) - np.sort(p[2] - p[3])), e),
    "aot_unpaired": lambda c, r, b, e, p: cdpo(b * (np.sort(c) - np.sort(r)), e),
    "apo_zero": lambda c, r, b, e, p: 1 - sigma(b * c) + sigma(b * r),
    "apo_down": lambda c, r, b, e, p: sigma(b * c) + 1 - sigma(b * (c - r)),
    "discopop": lambda c, r, b, e, p: (
        (1 - sigma(b * (c - r) / TAU)) * -np.log(sigma(b * (c - r)))
        + sigma(b * (c - r) / TAU) * np.exp(-b * (c - r))
    ),
    "sigmoid_norm": lambda c, r, b, e, p: -np.log(sigma(b * (c - r))),
    "sft": lambda c, r, b, e, p: -p[0],
}


def reference(logprobs, loss_type, beta, smoothing):
    p = [np.asarray(x, np.float64) for x in logprobs]
    return REFERENCE[loss_type](p[0] - p[2], p[1] - p[3], beta, smoothing, p)


def central_differences(f, xs, argument, step=1e-5):
    out = np.zeros(len(xs[argument]))
    for i in range(len(out)):
        ends = []
        for sign in (1, -1):
            moved = [np.array(x, np.float64) for x in xs]
            moved[argument][i] += sign * step
            ends.append(f(moved))
        out[i] = (ends[0] - ends[1]) / (2 * step)
    return out
