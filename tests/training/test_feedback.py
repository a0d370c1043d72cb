"""What is said of samples: the same truth and as much noise, whether as pairs, labels, ratings or rankings."""

import dataclasses
import math

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.training import feedback
from rlhf_jax.training.feedback import FEEDBACK, Taste

TASTE = Taste(
    "worth", lambda prompts, texts: [len(t) / 10 for t in texts], 4.0, 0.5, ("length:target=2",), 0.25
)
TEXTS = ["aaaa", "aaaaaaa"]  # 0.4 and 0.7: sigmoid(4 * 0.3) = 0.7685
CHANCE = 1 / (1 + math.exp(-1.2))


def said(kind, texts=TEXTS, n=4000, taste=TASTE):
    return [row for i in range(n) for row in FEEDBACK[kind](taste, "p", texts, (0, "train", i))]


def test_the_better_is_put_first_as_often_in_every_kind():
    """Within three standard errors of the Bradley-Terry probability."""
    near = lambda found: found == pytest.approx(CHANCE, abs=3 * math.sqrt(CHANCE * (1 - CHANCE) / 4000))
    assert near(sum(row["choice"] for row in said("pairwise")) / 4000)
    assert near(sum(row["completions"][0] == TEXTS[1] for row in said("ranking")) / 4000)
    rows = said("regression")
    rated = [row["ratings"]["worth"] for row in rows]
    assert near(sum(b > a for a, b in zip(rated[::2], rated[1::2], strict=True)) / 4000)
    assert sum(rated) / len(rated) == pytest.approx(0.55, abs=0.02)  # the noise has mean 0
    labels = [row["label"] for row in said("classification")]
    # Of labels that differ, the better one's is the accepted one as often.
    differ = [b for a, b in zip(labels[::2], labels[1::2], strict=True) if a != b]
    assert sum(differ) / len(differ) == pytest.approx(CHANCE, abs=0.04)
    assert sum(labels[1::2]) / 4000 == pytest.approx(1 / (1 + math.exp(-4 * 0.2)), abs=0.025)
    assert feedback.ceiling([[0.7, 0.4], [0.4, 0.7]], 4.0) == pytest.approx(CHANCE)


def test_a_ranking_is_plackett_luce():
    texts = ["a" * n for n in (2, 4, 6, 8)]
    rows = said("ranking", texts)
    weights = [math.exp(4 * len(text) / 10) for text in texts]
    first = sum(row["completions"][0] == texts[3] for row in rows) / len(rows)
    assert first == pytest.approx(weights[3] / sum(weights), abs=0.03)
    second = [row for row in rows if row["completions"][0] == texts[3]]
    share = sum(row["completions"][1] == texts[2] for row in second) / len(second)
    assert share == pytest.approx(weights[2] / sum(weights[:3]), abs=0.05)
    for row in rows[:50]:
        assert row["ratings"] == sorted(row["ratings"], reverse=True)
        assert row["gold"] == [len(text) / 10 for text in row["completions"]]


def test_aspects_lack_some_ratings_and_the_same_seed_says_the_same():
    rows = said("multi_objective", ["one", "one two"])
    assert 1 - len(rows) / 8000 == pytest.approx(
        0.25, abs=0.02
    )  # of one aspect: then there is nothing to say
    two = dataclasses.replace(TASTE, aspects=("length:target=2", "length:target=1"))
    rows = said("multi_objective", ["one", "one two"], taste=two)
    missing = sum(row["ratings"]["length:target=2"] is None for row in rows) / len(rows)
    assert missing == pytest.approx((0.25 - 0.25**2) / (1 - 0.25**2), abs=0.02)
    for kind in FEEDBACK:
        once, again = (FEEDBACK[kind](TASTE, "p", TEXTS, (1, "x", 0)) for _ in range(2))
        assert once == again
    with pytest.raises(InputError, match="config.preferences.aspects has 'regex"):
        Taste("worth", TASTE.gold, 1.0, 0.0, ("regex:pattern=a",), 0.0)
