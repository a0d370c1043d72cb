"""From comparisons of two completions to one score each.

Models that compare are not antisymmetric: which of two stands first moves their answer. Both orders are asked."""

from collections.abc import Callable, Sequence

import numpy as np


def against_the_others(
    compare: Callable, prompts: Sequence, completions: Sequence[Sequence[str]], *, even: float
) -> np.ndarray:
    """The mean result of each completion against every other of its prompt; Jiang et al. 2023, arXiv:2306.02561.

    Args:
      compare: [(prompt, first, second)] -> [N], how much better the first is: a probability or a difference of scores.
      completions: [B][G] texts, G of 2 or more.
      even: what `compare` says of equals: 0.5 of a probability, 0 of a difference.
    Returns: [B, G] float32 in the units of `compare`; `even` on the mean of a group.
    """
    B, G = len(prompts), len(completions[0])
    order = [(b, i, j) for b in range(B) for i in range(G) for j in range(G) if i != j]
    asked = [(prompts[b], completions[b][i], completions[b][j]) for b, i, j in order]
    result = np.zeros((B, G, G), np.float64)
    result[tuple(np.array(order).T)] = np.asarray(compare(asked), np.float64) - even
    better = (result - result.transpose(0, 2, 1)) / 2
    return (even + better.sum(2) / (G - 1)).astype(np.float32)
