"""One kind of judgement out of another."""

import random

import pytest

from rlhf_jax.data import conversions, formats
from rlhf_jax.data.records import Labelled, Pair, Ranking, Rated
from rlhf_jax.errors import InputError


@pytest.mark.parametrize("seed", range(10))
def test_pairs_keep_the_order_and_never_a_tie(seed):
    rng = random.Random(seed)
    records = [
        Rated(f"prompt {rng.randrange(4)}", f"completion {i}", {"score": rng.randrange(4)}) for i in range(30)
    ]
    score = {one.completion: one.ratings["score"] for one in records}
    prompt = {one.completion: one.prompt for one in records}
    pairs = conversions.pairs_of_rated(records, per_prompt=0)
    assert all(score[pair.chosen] > score[pair.rejected] for pair in pairs)
    assert all(prompt[pair.chosen] == prompt[pair.rejected] == pair.prompt for pair in pairs)
    unequal = sum(
        a.prompt == b.prompt and a.ratings != b.ratings for i, a in enumerate(records) for b in records[:i]
    )
    assert len({(pair.chosen, pair.rejected) for pair in pairs}) == len(pairs) == unequal


def test_drawn_pairs_depend_on_seed_and_prompt_alone():
    rankings = [Ranking(f"prompt {i}", tuple(f"{i} {k}" for k in range(9))) for i in range(20)]
    all_pairs = conversions.pairs_of_rankings(rankings, per_prompt=0)
    assert len(all_pairs) == 20 * 36
    drawn = conversions.pairs_of_rankings(rankings)
    assert len(drawn) == 20 * 10 and len(set(drawn)) == len(drawn) and set(drawn) <= set(all_pairs)
    assert drawn == conversions.pairs_of_rankings(rankings)
    backwards = conversions.pairs_of_rankings(rankings[::-1])
    assert set(backwards) == set(drawn)  # other prompts do not matter
    assert set(conversions.pairs_of_rankings(rankings, seed=1)) != set(drawn)
    # Over seeds every pair has its turn: 10 of 36, 200 times, is 56 times each with deviation 6.
    counts = dict.fromkeys(conversions.pairs_of_rankings(rankings[:1], per_prompt=0), 0)
    for seed in range(200):
        for pair in conversions.pairs_of_rankings(rankings[:1], seed=seed):
            counts[pair] += 1
    assert 30 < min(counts.values()) and max(counts.values()) < 85
    assert len(conversions.pairs_of_rankings(rankings, which="best", per_prompt=3)) == 60


def test_ratings_are_compared_on_what_all_have():
    first = Rated("p", "a", {"helpfulness": 3, "correctness": 1, "verbosity": 9})
    second = Rated("p", "b", {"helpfulness": 2, "verbosity": 0})
    (ranking,) = conversions.rankings_of_rated([second, first])
    assert ranking.completions == ("a", "b") and ranking.ratings == (3.0, 2.0)  # helpfulness alone: no style
    (ranking,) = conversions.rankings_of_rated([first, second], by="verbosity")
    assert ranking.ratings == (9.0, 0.0)
    assert (
        conversions.rankings_of_rated([first, Rated("p", "c", {"verbosity": 3})]) == []
    )  # nothing to compare
    assert conversions.rankings_of_rated([first, Rated("q", "c", first.ratings)]) == []  # other prompts
    overall = [Rated("p", "a", {"overall": 1, "wit": 9}), Rated("p", "b", {"overall": 2, "wit": 0})]
    assert conversions.rankings_of_rated(overall)[0].completions == ("b", "a")
    with pytest.raises(
        InputError, match="by is 'taste', an aspect .* expected one of correctness, helpfulness"
    ):
        conversions.rankings_of_rated([first, second], by="taste")


def test_labels_to_pairs_and_back():
    told = [("a", True), ("b", False), ("c", True), ("d", False)]
    records = [Labelled("p", text, accepted) for text, accepted in told] + [Labelled("q", "e", True)]
    pairs = conversions.pairs_of_labelled(records)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("a", "b"),
        ("a", "d"),
        ("c", "b"),
        ("c", "d"),
    ]
    assert len(conversions.pairs_of_labelled(records, which="best")) == 2
    assert len(conversions.pairs_of_labelled(records, per_prompt=3)) == 3
    (one, other) = conversions.labelled_of_pairs([Pair("p", "a", "b")])
    assert (one.completion, one.accepted, other.completion, other.accepted) == ("a", True, "b", False)
    assert conversions.pairs_of_labelled([one, other]) == [Pair("p", "a", "b")]
    (ranking,) = conversions.rankings_of_pairs([Pair("p", "a", "b")])
    assert ranking.completions == ("a", "b") and conversions.pairs_of_rankings([ranking]) == [
        Pair("p", "a", "b")
    ]


def test_options_out_of_range():
    for options in (dict(which="worst"), dict(per_prompt=-1), dict(per_prompt=True)):
        with pytest.raises(InputError, match=f"{next(iter(options))} is"):
            conversions.pairs_of_rankings([Ranking("p", ("a", "b"))], **options)
        with pytest.raises(InputError, match=f"{next(iter(options))} is"):
            conversions.pairs_of_labelled([], **options)


def test_files_are_compared_each_by_itself():
    """Two files may rate the same prompt on different scales."""
    from tests.data.made_rows import rows

    row = {"prompt": "p", "response": "a", "score": 1}
    found = rows(row, {**row, "response": "b", "score": 2}) + rows({**row, "score": 90}, source="q.jsonl")
    assert [(pair.chosen, pair.rejected) for pair in formats.pairs(found)] == [("b", "a")]
