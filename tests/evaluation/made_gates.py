"""Reward models that never were: arrays with a known fault each, for the gate's measures and judgement."""

import numpy as np

from configs import common
from rlhf_jax.evaluation import gate
from rlhf_jax.evaluation.gate_measures import Pairs, Samples, measure


def labelled(margin, seed=0, noise=0.0, a=1.0, **fields) -> Pairs:
    """Pairs of scores `margin` apart, the first preferred with noise + (1 - 2 noise) sigmoid(a margin)."""
    draw = np.random.default_rng(seed)
    N = len(margin)
    p = noise + (1 - 2 * noise) / (1 + np.exp(-a * margin))
    sign = np.where(draw.random(N) < p, 1.0, -1.0)
    scores = np.stack([margin * sign / 2, -margin * sign / 2], axis=1) + draw.normal(size=(N, 1))
    return Pairs(scores, fields.pop("tokens", draw.integers(5, 30, (N, 2))), prompts(N), **fields)


def prompts(count):
    return [f"prompt {i}" for i in range(count)]


def margins(count, seed=1, scale=2.0):
    return np.random.default_rng(seed).normal(size=count) * scale


def samples(within=1.0, between=1.0, gold=None, tokens=None, B=24, n=16, seed=5) -> Samples:
    """gold, tokens: what a unit of the proxy within a prompt goes with; None: gold is not known, lengths are random."""
    draw = np.random.default_rng(seed)
    of_answer = draw.normal(size=(B, n))
    lengths = 20 + draw.integers(-3, 4, (B, n)) if tokens is None else 20 + tokens * of_answer
    true = None if gold is None else gold * of_answer + 0.3 * draw.normal(size=(B, n))
    return Samples(within * of_answer + between * draw.normal(size=(B, 1)), lengths, true)


def by_heart(count, seed) -> Pairs:
    return labelled(8 + np.abs(margins(count, seed)), noise=0.0)


def length_only(count=400) -> Pairs:
    draw = np.random.default_rng(3)
    tokens = draw.integers(5, 60, (count, 2))
    return Pairs(0.1 * tokens, tokens, prompts(count))


def flat(count=300) -> Pairs:
    """Scores that differ between prompts and hardly between answers."""
    pairs = labelled(0.02 * margins(count))
    return Pairs(
        pairs.scores + 3 * np.random.default_rng(4).normal(size=(count, 1)), pairs.tokens, pairs.prompts
    )


def none() -> Pairs:
    return Pairs(np.zeros((0, 2)), np.zeros((0, 2)), [])


def mixed() -> Pairs:
    """Right on one source, wrong on the other."""
    pairs = labelled(margins(400, scale=4))
    wrong = np.arange(400) < 40
    scores = np.where(wrong[:, None], np.sort(pairs.scores, axis=1), pairs.scores)
    return Pairs(scores, pairs.tokens, pairs.prompts, np.where(wrong, "forum", "survey").tolist())


healthy = lambda count=300, seed=0: labelled(margins(count, 1 + seed), seed)
FAR = dict(train_pairs=3000, passes=30.0)
# name -> (measures, verdict, what the reason has)
CASES = {
    "healthy": (lambda: measure(healthy(), healthy(seed=9), samples(gold=1.0)), "pass", "pairs that it has not seen"),
    "memorised": (
        lambda: measure(labelled(margins(300, scale=12), noise=0.4), by_heart(300, 2), **FAR),
        "refuse",
        "by heart after 30 passes over 3,000 pairs",
    ),
    "elsewhere": (
        lambda: measure(labelled(margins(900, scale=2), a=0), healthy(600, 9), elsewhere=True),
        "refuse",
        "does not carry over to these pairs",
    ),
    "by heart, and sound": (lambda: measure(healthy(), by_heart(300, 2)), "warn", "by heart"),
    "a coin": (lambda: measure(labelled(0.5 * margins(1000), a=0)), "refuse", "trained on noise"),
    "a coin, few pairs": (lambda: measure(labelled(0.5 * margins(40), seed=2, a=0)), "warn", "be told from a coin"),
    "sure of itself": (lambda: measure(labelled(20 * margins(400), a=0.02)), "refuse", "differ by"),
    "length": (lambda: measure(length_only()), "refuse", "it is a ruler"),
    "flat": (lambda: measure(flat(), None, samples(within=0.05, between=3.0)), "refuse", "rates the question"),
    "hacked": (lambda: measure(healthy(), None, samples(gold=-1.0)), "refuse", "would make the text worse"),
    "no use": (lambda: measure(healthy(), None, samples(gold=0.0)), "warn", "nothing shows that what it likes"),
    "long": (lambda: measure(healthy(), None, samples(tokens=12.0)), "warn", "length is what it pays for"),
    "by heart, nothing held out": (lambda: measure(none(), by_heart(64, 2), **FAR), "refuse", "no pair was held out"),
    "nothing held out": (lambda: measure(none(), healthy()), "warn", "No pair was held out"),
    "few": (lambda: measure(labelled(3 * margins(20))), "warn", "Only 20 pairs"),
    "duplicates": (lambda: measure(healthy(), seen=60), "warn", "60 of the 300 held-out pairs"),
    "a source": (lambda: measure(mixed()), "warn", "On forum it is right in only 0%"),
}  # fmt: skip


def thresholds(**changed) -> gate.Thresholds:
    section = common.get_config().gate
    return gate.Thresholds(**{name: section[name] for name in gate.Thresholds.__annotations__} | changed)
