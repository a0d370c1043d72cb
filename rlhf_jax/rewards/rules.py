"""Rewards computed from text alone. RULES maps a name in a config to score(prompts, completions) -> list of floats.

Knows no model and no tokens."""

import functools


@functools.cache
def _vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(prompts: list[str], completions: list[str]) -> list[float]:
    """VADER's compound sentiment of each completion alone, -1 (worst) to 1 (best); 0 where no word is charged.

    Hutto & Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
    """
    return [_vader().polarity_scores(completion)["compound"] for completion in completions]


RULES = {"sentiment": sentiment}
DESCRIPTIONS = {"sentiment": "sentiment (VADER compound, -1 to 1)"}
