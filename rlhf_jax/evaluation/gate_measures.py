"""What can be measured of a reward model before RL trusts it: on labelled pairs, and on samples of the starting policy.

Knows arrays of scores, lengths and gold rewards; no model, no file, and nothing of what is good or bad. Every interval
is a 95% bootstrap interval over prompts, because pairs of one prompt are not independent."""

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from rlhf_jax.evaluation.best_of_n import best_of_n_curve
from rlhf_jax.evaluation.label_noise import label_noise, scale_of, softplus
from rlhf_jax.evaluation.reward_quality import calibration, correlation

SURE = 0.99  # a probability beyond this, or below 1 - this, counts as saturated
ALIKE = 0.1  # lengths that differ by at most this share of the longer (or one token) are alike
BINS = 10
FEW_GROUPS = 10
SIMULATED = 200  # sets of labels that tell which calibration error comes by chance
GROUPS = ("the better one is shorter", "alike in length", "the better one is longer")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """N pairs with a reward model's raw scores, the one that the label prefers first."""

    scores: np.ndarray  # [N, 2]
    tokens: np.ndarray  # [N, 2] lengths of the completions
    prompts: Sequence[Hashable]  # N; equal ones are one prompt
    sources: Sequence[str] | None = None  # N
    gold: np.ndarray | None = None  # [N, 2] gold rewards
    labels: np.ndarray | None = (
        None  # [N] in [0.5, 1], probability that the first is the better; None: no doubt
    )

    def __post_init__(self):
        for name in ("scores", "tokens", "gold"):
            x = getattr(self, name)
            if x is not None:
                object.__setattr__(self, name, np.asarray(x, np.float64).reshape(-1, 2))
                if len(getattr(self, name)) != len(self.prompts):
                    raise ValueError(
                        f"{name} has {len(getattr(self, name))} pairs; prompts are {len(self.prompts)}."
                    )
        labels = np.ones(len(self.prompts)) if self.labels is None else np.asarray(self.labels, np.float64)
        if labels.shape != (len(self.prompts),) or not ((labels >= 0.5) & (labels <= 1)).all():
            raise ValueError(f"labels are {labels}; expected {len(self.prompts)} numbers from 0.5 to 1.")
        object.__setattr__(self, "labels", labels)

    @property
    def margin(self) -> np.ndarray:
        return self.scores[:, 0] - self.scores[:, 1]

    @property
    def decided(self) -> np.ndarray:
        """[N] in [0, 1], the weight of each pair where right or wrong is counted: 0 where its label is a coin."""
        return 2 * self.labels - 1

    def losses(self, scale: float) -> np.ndarray:
        """[N] nats, cross-entropy of P(the first is better) = sigmoid(scale * margin) against the label."""
        logits = scale * self.margin
        return self.labels * softplus(-logits) + (1 - self.labels) * softplus(logits)

    def some(self, chosen) -> "Pairs":
        """Those of a mask [N]; of their arrays what a bootstrap needs."""
        prompts = [self.prompts[i] for i in np.flatnonzero(chosen)]
        return Pairs(self.scores[chosen], self.tokens[chosen], prompts, labels=self.labels[chosen])

    @property
    def groups(self) -> np.ndarray:
        """[N] int, the number of each pair's prompt."""
        numbers = {}
        return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in self.prompts], int)


@dataclasses.dataclass(frozen=True)
class Samples:
    """n samples of the starting policy for each of B prompts."""

    scores: np.ndarray  # [B, n] raw scores
    tokens: np.ndarray  # [B, n]
    gold: np.ndarray | None = None  # [B, n]


def measure(
    held_out: Pairs,
    train: Pairs | None = None,
    samples: Samples | None = None,
    *,
    train_pairs: int = 0,
    passes: float | None = None,
    seen: int = 0,
    elsewhere: bool = False,
    coin_scale: float | None = None,
    probabilities: bool = True,
    bootstrap_samples: int = 2000,
    seed: int = 0,
) -> dict:
    """All measures as JSON; what cannot be measured is None.
    Args:
      held_out: pairs that the model was not trained on; may be none.
      train: a sample of those that it was trained on.
      train_pairs, passes: how many there were in all, and how often it saw each.
      seen: held-out pairs that are word for word among the training pairs.
      elsewhere: whether the held-out pairs are of other data than the training pairs.
      coin_scale: of the Bradley-Terry coin on gold rewards that made the labels, where one did.
      probabilities: False for a model whose difference of scores was not trained to be the log-odds of a label; it is
        then scaled by the one number that fits the held-out labels best.
    """
    rng, margin, N = np.random.default_rng(seed), held_out.margin, len(held_out.prompts)
    known = train is not None and len(train.prompts) > 0
    scale = 1.0 if probabilities else scale_of(margin, held_out.labels)
    boot = lambda values, pairs, weights=None: resampled(
        values, pairs.groups, bootstrap_samples, rng, weights
    )
    right, losses = (margin > 0).astype(float), held_out.losses(scale)
    dist, dist_loss = boot(right, held_out, held_out.decided), boot(losses, held_out)
    found = {
        "held_out_pairs": int((held_out.decided > 0).sum()),
        "undecided_pairs": int(
            (held_out.decided == 0).sum()
        ),  # their labels are coins: neither right nor wrong
        "held_out_prompts": len(set(held_out.prompts)),
        "train_pairs": train_pairs,
        "scored_train_pairs": len(train.prompts) if known else 0,
        "passes": passes,
        "seen_pairs": seen,
        "elsewhere": elsewhere,
        "scale": scale,
        "probabilities": probabilities,
        "accuracy": interval(right, dist, held_out.decided),
        "loss": interval(losses, dist_loss),
        "train_accuracy": None,
        "train_loss": None,
        "accuracy_gap": None,
        "loss_gap": None,
        "ceiling": None,
        "gold": None,
    }
    if known:
        train_right, train_losses = (train.margin > 0).astype(float), train.losses(scale)
        train_dist = boot(train_right, train, train.decided)
        train_dist_loss = boot(train_losses, train)
        found["train_accuracy"] = interval(train_right, train_dist, train.decided)
        found["train_loss"] = interval(train_losses, train_dist_loss)
        if found["accuracy"] and found["train_accuracy"]:
            gap = found["train_accuracy"]["value"] - found["accuracy"]["value"]
            found["accuracy_gap"] = _interval(gap, train_dist - dist)
            found["loss_gap"] = _interval(losses.mean() - train_losses.mean(), dist_loss - train_dist_loss)
    found |= of_length(held_out, right, boot)
    found["by_source"] = by_source(held_out, right, boot)
    found |= of_calibration(scale * margin, held_out.labels, rng)
    sure_ones = np.abs(scale * margin) > LOG_ODDS
    found["saturation"] = {
        "held_out": sure(scale * margin),
        "train": sure(scale * train.margin) if known else None,
        "wrong_when_sure": _mean(1 - right[sure_ones], held_out.decided[sure_ones]),
    }
    found["label_noise"] = label_noise(margin, held_out.decided)
    if held_out.gold is not None and N:
        found["gold"] = of_gold(held_out, boot)
        if coin_scale is not None:
            found["ceiling"] = ceiling(held_out.gold, coin_scale)
    found["preview"], found["spread"] = None, spread_of_pairs(held_out)
    if samples is not None:
        found["preview"], found["spread"] = preview(samples), spread_of_samples(samples.scores)
    found["points"] = {
        "chosen": _points(held_out, 0),
        "rejected": _points(held_out, 1),
        "train_margin": np.round(scale * train.margin, 4).tolist() if known else [],
    }
    return found


LOG_ODDS = float(np.log(SURE / (1 - SURE)))


# Intervals


def resampled(values, groups, samples: int, rng, weights=None) -> np.ndarray:
    """[samples] means of `values` [N], weighted by `weights` [N] or all alike, over groups drawn with replacement; all
    values of a group go together.

    With fewer than FEW_GROUPS groups these say nothing of groups in general, so values are drawn one by one.
    """
    values, groups = np.asarray(values, float), np.asarray(groups, int)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    if not weights.sum():
        return np.full(samples, np.nan)
    if len(np.unique(groups)) < FEW_GROUPS:
        groups = np.arange(len(values))
    sums, counts = np.bincount(groups, weights * values), np.bincount(groups, weights)
    sums, counts = sums[counts > 0], counts[counts > 0]
    drawn, step = [], max(1, 4_000_000 // len(sums))
    for start in range(0, samples, step):
        chosen = rng.integers(0, len(sums), (min(step, samples - start), len(sums)))
        drawn.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    return np.concatenate(drawn)


def interval(values, dist, weights=None) -> dict | None:
    """{"value", "low", "high"}: the mean, weighted as `dist` is, and the middle 95% of what resampling gives; None of
    nothing."""
    value = _mean(values, weights)
    return None if value is None else _interval(value, dist)


def _interval(value, dist):
    low, high = np.percentile(dist, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def _mean(values, weights=None):
    if not len(values) or (weights is not None and not np.sum(weights)):
        return None
    return float(np.average(values, weights=weights))


# Parts


def of_length(pairs: Pairs, right, boot) -> dict:
    """Accuracy by what length would say, the rule "the longer one wins", and how scores go with length."""
    longer, gap = pairs.tokens.max(1, initial=0), pairs.tokens[:, 0] - pairs.tokens[:, 1]
    kind = np.where(np.abs(gap) <= np.maximum(1, ALIKE * longer), 1, np.where(gap < 0, 0, 2))
    rule, weights = (np.sign(gap) + 1) / 2, pairs.decided  # two of one length: a coin
    rows = [
        {"group": name, "pairs": int(((kind == number) & (weights > 0)).sum())}
        | {"accuracy": _of_some(pairs, right, kind == number, boot, weights)}
        for number, name in enumerate(GROUPS)
    ]
    if not weights.sum():
        return {"by_length": rows, "longer_wins": None, "beyond_length": None, "length_correlation": None}
    best = max(rule, 1 - rule, key=lambda one: _mean(one, weights))  # of the two rules
    return {
        "by_length": rows,
        "longer_wins": interval(rule, boot(rule, pairs, weights), weights),
        "beyond_length": interval(right - best, boot(right - best, pairs, weights), weights),
        "length_correlation": {
            "pearson": correlation(pairs.scores.ravel(), pairs.tokens.ravel()),
            "spearman": rank_correlation(pairs.scores.ravel(), pairs.tokens.ravel()),
            # Of pairs seen both ways, so that which one the label prefers plays no part.
            "within_pairs": rank_correlation(
                np.concatenate([pairs.margin, -pairs.margin]), np.concatenate([gap, -gap])
            ),
        },
    }


def by_source(pairs: Pairs, right, boot) -> list[dict]:
    """Accuracy in each source, the largest first; none where there is but one."""
    names = np.array(pairs.sources if pairs.sources is not None else [], dtype=object)
    counts = sorted(((int((names == name).sum()), name) for name in set(names)), key=lambda c: (-c[0], c[1]))
    if len(counts) < 2:
        return []
    return [
        {
            "source": str(name),
            "pairs": count,
            "accuracy": _of_some(pairs, right, names == name, boot, pairs.decided),
        }
        for count, name in counts
    ]


def _of_some(pairs, values, chosen, boot, weights=None):
    some, weights = pairs.some(chosen), None if weights is None else weights[chosen]
    return interval(values[chosen], boot(values[chosen], some, weights), weights)


def of_calibration(logits, labels, rng) -> dict:
    """Expected calibration error of P(chosen) = sigmoid(logits) [N] against labels [N], and what calibrated scores like
    these would show by chance: with few pairs no bin is exact. Of labels in doubt that is an upper bound, since they
    differ less than the outcomes that are drawn."""
    confidence = sigmoid(np.abs(logits))
    right = np.where(logits == 0, 0.5, np.where(logits > 0, labels, 1 - labels))
    if not len(logits):
        return {"calibration": [], "ece": None, "ece_by_chance": None}
    chance = [ece(confidence, rng.random(len(logits)) < confidence) for _ in range(SIMULATED)]
    return {
        "calibration": calibration(logits, BINS, labels),
        "ece": ece(confidence, right),
        "ece_by_chance": float(np.mean(chance)),
    }


def ece(confidence, right, bins: int = BINS) -> float:
    """Guo et al. 2017, arXiv:1706.04599: mean over pairs of |accuracy - confidence| of their bin.
    confidence: [N] in [0.5, 1], of the side that the model prefers; right: [N] in [0, 1]."""
    index = np.minimum(((np.asarray(confidence) - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = np.bincount(index, np.asarray(right, float) - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(index))


def sure(logits) -> float | None:
    """Share of pairs with P(chosen) beyond SURE, either way."""
    return _mean(np.abs(logits) > LOG_ODDS)


def of_gold(pairs: Pairs, boot) -> dict:
    """How often the model orders a pair as the gold reward does, gold's ties left out."""
    difference = pairs.gold[:, 0] - pairs.gold[:, 1]
    decided = difference != 0
    agree = (np.sign(pairs.margin) == np.sign(difference)).astype(float)
    return {
        "pairs": int(decided.sum()),
        "accuracy": _of_some(pairs, agree, decided, boot),
        "correlation": correlation(pairs.scores.ravel(), pairs.gold.ravel()),
    }


def ceiling(gold, coin_scale: float) -> float:
    """The best accuracy anyone can have on labels by a Bradley-Terry coin on gold rewards [N, 2]."""
    p = sigmoid(coin_scale * (gold[:, 0] - gold[:, 1]))
    return float(np.maximum(p, 1 - p).mean())


def spread_of_pairs(pairs: Pairs) -> dict | None:
    """See spread_of_samples; of the two completions of each pair."""
    return spread_of_samples(pairs.scores) if len(pairs.prompts) > 1 else None


def spread_of_samples(scores) -> dict | None:
    """Which part of the variance of scores [B, n] lies between answers to one prompt: all that RL can learn from.

    {"within", "between": deviations in reward units, "share": within^2 / (within^2 + between^2)}; "between" is of the
    prompts' own means, freed of what n answers add to it."""
    scores = np.asarray(scores, np.float64)
    B, n = scores.shape
    if B < 2 or n < 2:
        return None
    within = scores.var(axis=1, ddof=1).mean()
    between = max(scores.mean(1).var(ddof=1) - within / n, 0.0)
    share = within / (within + between) if within + between > 0 else 0.0
    return {"within": float(within**0.5), "between": float(between**0.5), "share": float(share)}


def preview(samples: Samples) -> dict:
    """Best of 1, 2, 4, ... n by the proxy: its own reward in deviations of the policy's samples, the gold reward and
    the length. With standard errors of their change since n = 1, over prompts."""
    proxy, n = np.asarray(samples.scores, np.float64), np.shape(samples.scores)[1]
    ns = sorted({2**i for i in range(n.bit_length())} | {n})
    mean, std = proxy.mean(), max(proxy.std(), 1e-6)
    columns = {"proxy": (proxy - mean) / std, "length": samples.tokens, "gold": samples.gold}
    found = {"n": ns, "prompts": len(proxy), "mean": float(mean), "std": float(std), "gold": None}
    for name, values in columns.items():
        if values is None:
            continue
        curve = best_of_n_curve(proxy, values, ns)
        found[name], found["kl"] = curve["gold"].mean(0).tolist(), curve["kl"].tolist()
        change = curve["gold"] - curve["gold"][:, :1]
        error = change.std(axis=0, ddof=1) / len(change) ** 0.5 if len(change) > 1 else None
        found[f"{name}_error"] = None if error is None else error.tolist()
    return found


def rank_correlation(x, y) -> float | None:
    """Spearman's, ties sharing their mean rank; None where one of them does not vary."""
    return correlation(ranks(x), ranks(y)) if len(x) > 1 else None


def ranks(values):
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def _points(pairs, side):
    return np.round(np.stack([pairs.scores[:, side], pairs.tokens[:, side]], axis=1), 4).tolist()
