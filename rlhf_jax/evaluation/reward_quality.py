"""How good a reward model is on held-out pairs: accuracy against the labels, their ceiling, the gold; calibration.

Knows scores and labels, not models."""

import numpy as np


def quality(scores, gold=None, ceiling=None, train_pairs=0, bins=8) -> dict:
    """The content of reward_model.json.
    Args:
      scores: [N, 2] of held-out pairs, chosen first.
      gold: [N, 2] gold rewards of the same completions, or None where they are not known.
      ceiling: the best accuracy anyone can have on labels this noisy, or None.
    """
    scores = np.asarray(scores, np.float64)
    margin = scores[:, 0] - scores[:, 1]
    found = {
        "train_pairs": train_pairs,
        "held_out_pairs": len(scores),
        "accuracy": float((margin > 0).mean()),  # a tie is wrong
        "ceiling": ceiling,
        "gold_accuracy": None,
        "calibration": calibration(margin, bins),
        "chosen": scores[:, 0].tolist(),
        "rejected": scores[:, 1].tolist(),
        "gold": [],
    }
    if gold is not None:
        gold = np.asarray(gold, np.float64)
        difference = gold[:, 0] - gold[:, 1]
        decided = difference != 0
        agree = np.sign(margin) == np.sign(difference)
        found["gold_accuracy"] = float(agree[decided].mean()) if decided.any() else None
        found["gold_correlation"] = correlation(scores.ravel(), gold.ravel())
        found["gold"] = np.stack([scores.ravel(), gold.ravel()], axis=1).tolist()
    return found


def calibration(margin, bins: int, labels=None) -> list[list[float]]:
    """[mean predicted probability, observed fraction, count] a bin, over both orders of each pair.
    labels: [N], the probability that the one with the margin is the better; None: 1."""
    p = 1 / (1 + np.exp(-np.clip(margin, -50, 50)))
    predicted = np.concatenate([p, 1 - p])
    right = np.ones_like(p) if labels is None else np.asarray(labels, np.float64)
    observed = np.concatenate([right, 1 - right])
    index = np.minimum((predicted * bins).astype(int), bins - 1)
    rows = []
    for b in range(bins):
        inside = index == b
        if inside.any():
            rows.append([float(predicted[inside].mean()), float(observed[inside].mean()), int(inside.sum())])
    return rows


def correlation(x, y) -> float | None:
    """Pearson's; None where one of them does not vary."""
    if np.std(x) == 0 or np.std(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
