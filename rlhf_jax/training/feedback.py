"""What a person with a known taste would say of samples: pairs, labels, ratings or rankings, each through noise.

The noise is one: a completion is judged by its gold reward plus Gumbel noise of scale 1 / coin_scale. Differences of
two are then logistic, so of any two completions one is put above the other with the Bradley-Terry probability
sigmoid(coin_scale * difference), and a ranking is Plackett-Luce's. Knows text; no model, no file."""

import dataclasses
import math
import random
from collections.abc import Callable

from rlhf_jax.data.formats import readable
from rlhf_jax.errors import InputError
from rlhf_jax.rewards import specs


@dataclasses.dataclass(frozen=True)
class Taste:
    """gold: a rule. The rest: config.preferences."""

    name: str
    gold: Callable  # (prompts, completions) -> rewards
    coin_scale: float
    threshold: float  # gold reward of a completion that is accepted half of the time
    aspects: tuple[str, ...]  # rewards as in config.rewards.components, of multi_objective
    missing: float  # fraction of its ratings that are left out

    def __post_init__(self):
        for spec in self.aspects:
            if not specs.parse(spec).in_process:
                raise InputError(
                    f"config.preferences.aspects has {spec!r}, which needs a process of its own; expected rules "
                    "such as sentiment or length:target=12."
                )

    def golds(self, prompt, texts) -> list[float]:
        return self.gold([readable(prompt)] * len(texts), list(texts))


def pair(taste: Taste, prompt, texts, seed: tuple) -> list[dict]:
    """One row in Vertex's format: `choice` is 0 or 1 by a Bradley-Terry coin on the gold rewards."""
    first, second = taste.gold([prompt] * 2, texts)
    p_first = sigmoid(taste.coin_scale * (first - second))
    choice = 0 if random.Random(repr(seed)).random() < p_first else 1
    row = {"input_text": prompt, "candidate_0": texts[0], "candidate_1": texts[1], "choice": choice}
    return [row | {"gold_0": first, "gold_1": second}]


def labels(taste: Taste, prompt, texts, seed: tuple) -> list[dict]:
    """Accepted with probability sigmoid(coin_scale * (gold - threshold))."""
    draw = random.Random(repr(seed))
    return [
        {
            "prompt": prompt,
            "completion": text,
            "label": draw.random() < sigmoid(taste.coin_scale * (gold - taste.threshold)),
            "gold": gold,
        }
        for text, gold in zip(texts, taste.golds(prompt, texts), strict=True)
    ]


def ratings(taste: Taste, prompt, texts, seed: tuple) -> list[dict]:
    draw = random.Random(repr(seed))
    return [
        {
            "prompt": prompt,
            "completion": text,
            "ratings": {taste.name: gold + noise(taste, draw)},
            "gold": gold,
        }
        for text, gold in zip(texts, taste.golds(prompt, texts), strict=True)
    ]


def aspect_ratings(taste: Taste, prompt, texts, seed: tuple) -> list[dict]:
    """A rating of each aspect, or null; a completion that would have none gets no row."""
    draw, asked = random.Random(repr(seed)), [readable(prompt)] * len(texts)
    known = {spec: specs.parse(spec).load()(asked, list(texts)) for spec in taste.aspects}
    rated = lambda value: None if draw.random() < taste.missing else value + noise(taste, draw)
    rows = [
        {
            "prompt": prompt,
            "completion": text,
            "ratings": {spec: rated(values[n]) for spec, values in known.items()},
            "gold": gold,
        }
        for n, (text, gold) in enumerate(zip(texts, taste.golds(prompt, texts), strict=True))
    ]
    return [row for row in rows if any(value is not None for value in row["ratings"].values())]


def ranking(taste: Taste, prompt, texts, seed: tuple) -> list[dict]:
    """Best first, by noisy ratings."""
    draw = random.Random(repr(seed))
    rated = [
        (gold + noise(taste, draw), gold, t)
        for t, gold in zip(texts, taste.golds(prompt, texts), strict=True)
    ]
    rated.sort(key=lambda one: -one[0])
    found, gold, completions = (list(column) for column in zip(*rated, strict=True))
    return [{"prompt": prompt, "completions": completions, "ratings": found, "gold": gold}]


# Kind of reward model -> (prompt, texts) to rows.
FEEDBACK = {
    "pairwise": pair,
    "token_level": pair,
    "ranking": ranking,
    "classification": labels,
    "regression": ratings,
    "multi_objective": aspect_ratings,
}


def noise(taste: Taste, draw: random.Random) -> float:
    """Gumbel's, of mean 0 and scale 1 / coin_scale."""
    u = draw.random() or 0.5  # 0 has no logarithm
    return (-math.log(-math.log(u)) - 0.5772156649015329) / taste.coin_scale


def ceiling(gold, coin_scale: float) -> float:
    """The best accuracy anyone can have on pairs of such feedback: mean of max(p, 1 - p). gold: [M, 2]."""
    chances = [sigmoid(coin_scale * (first - second)) for first, second in gold]
    return sum(max(p, 1 - p) for p in chances) / len(chances)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
