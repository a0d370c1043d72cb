"""Beam search as the papers tell it, in plain Python and float64: slow, obvious, and independent of the package.

`table` maps every prefix (a tuple of tokens) to the log-probabilities of the next one."""

import itertools

import numpy as np


def sequences(table, vocabulary, eos_ids, length):
    """{complete sequence: sum of its log-probabilities}: ended, or of the full length."""
    found = {}
    for n in range(1, length + 1):
        for tokens in itertools.product(range(vocabulary), repeat=n):
            ends = [token in eos_ids for token in tokens]
            if any(ends[:-1]) or not (ends[-1] or n == length):
                continue
            found[tokens] = sum(table[tokens[:i]][tokens[i]] for i in range(n))
    return found


def search(
    table, vocabulary, eos_ids, length, num_beams, length_penalty, early_stopping, groups=1, penalty=0.0
):
    """[(score, tokens)], best first, of all groups: the rules of transformers for what is kept and when to stop."""
    size = num_beams // groups
    running = [[(0.0, ())] for _ in range(groups)]
    complete = [[] for _ in range(groups)]
    is_open = [True] * groups
    for step in range(length):
        taken = np.zeros(vocabulary)
        for g in range(groups):
            if not is_open[g]:
                continue
            candidates = [
                (score + table[tokens][token] - penalty * taken[token], (*tokens, token))
                for score, tokens in running[g]
                for token in range(vocabulary)
            ]
            candidates.sort(key=lambda pair: -pair[0])
            candidates = candidates[: max(2, 1 + len(eos_ids)) * size]
            stops = lambda tokens: tokens[-1] in eos_ids or len(tokens) == length
            for score, tokens in candidates[:size]:
                if stops(tokens):
                    complete[g].append((score / len(tokens) ** length_penalty, tokens))
            complete[g] = sorted(complete[g], key=lambda pair: -pair[0])[:size]
            running[g] = [pair for pair in candidates if pair[1][-1] not in eos_ids][:size]
            for _, tokens in running[g]:
                taken[tokens[-1]] += 1
            if not running[g]:
                is_open[g] = False
            elif len(complete[g]) == size:
                horizon = length if early_stopping == "never" and length_penalty > 0 else step + 1
                best = running[g][0][0] / horizon**length_penalty
                is_open[g] = early_stopping is not True and best > complete[g][-1][0]
    return sorted((pair for group in complete for pair in group), key=lambda pair: -pair[0])
