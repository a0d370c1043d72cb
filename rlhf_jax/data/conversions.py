"""One kind of judgement out of another, where nothing has to be made up: ratings order completions, an order gives
pairs, a pair an accepted completion and another. Completions of equal rating are never a pair.

Knows records, not where they come from."""

import collections
import random
from collections.abc import Sequence

from rlhf_jax.data.records import Example, Labelled, Messages, Pair, Ranking, Rated
from rlhf_jax.errors import InputError

STYLE = ("complexity", "verbosity")  # ratings of what a completion is like: more is not better
WHICH = ("all", "best")


def rankings_of_rated(records: Sequence[Rated], *, by: str = "") -> list[Ranking]:
    """One ranking a prompt that has two completions of different ratings, in the order of the prompts.

    Args:
      by: the aspect that orders them. Empty: `overall`, or without it the mean of the aspects that all of a prompt's
        completions have, less those of style (complexity, verbosity).
    """
    if by and records and not any(by in one.ratings for one in records):
        known = ", ".join(sorted({name for one in records for name in one.ratings}))
        raise InputError(f"by is {by!r}, an aspect that no completion is rated on; expected one of {known}.")
    made = []
    for group in _by_prompt(records):
        values = _comparable(group, by)
        order = sorted(
            range(len(values)), key=lambda i, values=values: -values[i]
        )  # equals in the order of the file
        if order and values[order[0]] > values[order[-1]]:
            best, completions = group[order[0]], tuple(group[i].completion for i in order)
            made.append(Ranking(best.prompt, completions, tuple(values[i] for i in order), best.row))
    return made


def _comparable(group: list[Rated], by: str) -> list[float]:
    """One number a completion, made of the aspects that all have; none where there is no such aspect."""
    aspects = set.intersection(*(set(one.ratings) for one in group))
    if by or "overall" in aspects:
        aspects &= {by or "overall"}
    else:
        aspects -= set(STYLE)
    return [sum(one.ratings[name] for name in sorted(aspects)) / len(aspects) for one in group if aspects]


def pairs_of_rankings(
    records: Sequence[Ranking], *, which: str = "all", per_prompt: int = 10, seed: int = 0
) -> list[Pair]:
    """Pairs of completions whose ratings differ; without ratings, the better one of each two is the first.

    Args:
      which: all pairs, or the best completion against each other one.
      per_prompt: at most so many pairs of a ranking, drawn without replacement; 0: all. The default is StackLLaMA's.
      seed: of that draw, which depends on seed and prompt alone.
    """
    _check(which, per_prompt)
    made = []
    for one in records:
        ranks = range(len(one.completions)) if one.ratings is None else [-rating for rating in one.ratings]
        firsts = range(len(ranks)) if which == "all" else [0]
        both = [(i, j) for i in firsts for j in range(i + 1, len(ranks)) if ranks[i] < ranks[j]]
        both = _some(both, per_prompt, seed, one.prompt)
        made += [Pair(one.prompt, one.completions[i], one.completions[j], row=one.row) for i, j in both]
    return made


def pairs_of_rated(records: Sequence[Rated], *, by: str = "", **options) -> list[Pair]:
    return pairs_of_rankings(rankings_of_rated(records, by=by), **options)


def pairs_of_labelled(
    records: Sequence[Labelled], *, which: str = "all", per_prompt: int = 10, seed: int = 0
) -> list[Pair]:
    """Each accepted completion of a prompt against each other one; `which` "best": the first accepted one alone."""
    _check(which, per_prompt)
    made = []
    for group in _by_prompt(records):
        good, bad = ([one for one in group if one.accepted is accepted] for accepted in (True, False))
        both = [(one, other) for one in (good if which == "all" else good[:1]) for other in bad]
        made += [
            Pair(one.prompt, one.completion, other.completion, row=one.row)
            for one, other in _some(both, per_prompt, seed, group[0].prompt)
        ]
    return made


def labelled_of_pairs(records: Sequence[Pair]) -> list[Labelled]:
    """The chosen completion as accepted, the rejected one as not."""
    return [
        Labelled(pair.prompt, completion, accepted, pair.row)
        for pair in records
        for completion, accepted in ((pair.chosen, True), (pair.rejected, False))
    ]


def rankings_of_pairs(records: Sequence[Pair]) -> list[Ranking]:
    return [Ranking(pair.prompt, (pair.chosen, pair.rejected), row=pair.row) for pair in records]


def examples_of_pairs(records: Sequence[Pair]) -> list[Example]:
    """The chosen completions."""
    return [Example(pair.prompt, pair.chosen, pair.row) for pair in records]


def examples_of_labelled(records: Sequence[Labelled]) -> list[Example]:
    """The accepted completions."""
    return [Example(one.prompt, one.completion, one.row) for one in records if one.accepted]


def _check(which, per_prompt):
    if which not in WHICH:
        raise InputError(f"which is {which!r}; expected one of {', '.join(WHICH)}.")
    if type(per_prompt) is not int or per_prompt < 0:
        raise InputError(f"per_prompt is {per_prompt!r}; expected a number of pairs, or 0 for all.")


def _by_prompt(records) -> list[list]:
    groups = collections.defaultdict(list)
    for one in records:
        groups[repr(one.prompt)].append(one)
    return list(groups.values())


def _some(both: list, at_most: int, seed: int, prompt: str | Messages) -> list:
    if not at_most or len(both) <= at_most:
        return both
    kept = random.Random(repr((seed, prompt))).sample(range(len(both)), at_most)
    return [both[i] for i in sorted(kept)]
