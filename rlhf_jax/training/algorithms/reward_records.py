"""Records of feedback to the groups and pairs of reward models.

A group is (prompt, completions, row, fields of GroupedBatch beside them); a pair is two completions of one prompt, the
better first, each (number of the record, number of the completion in it). Knows records; no model, no loss."""

import dataclasses
import math

from rlhf_jax.data import formats
from rlhf_jax.errors import InputError
from rlhf_jax.training.algorithms.row import Settings


@dataclasses.dataclass(frozen=True)
class Scale:
    """Aspects of the training ratings. Heads predict (rating - mean) / std, so that no unit outweighs another."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, settings, records) -> "Scale":
        """Raises: InputError for an aspect that is unknown or does not vary."""
        found = list(dict.fromkeys(name for record in records for name in record.ratings))
        names = settings.aspects or tuple(sorted(found))
        if settings.feedback == "regression" and len(names) != 1:
            raise InputError(
                f"config.reward_model.aspects is empty and the ratings have {', '.join(names)}; name the one that "
                "regression learns, or choose kind=multi_objective."
            )
        mean, std = [], []
        for name in names:
            values = [record.ratings[name] for record in records if name in record.ratings]
            if not values or min(values) == max(values):
                raise InputError(
                    f"the ratings have {'no' if not values else 'one single value of'} aspect {name!r}; there are "
                    f"{', '.join(found)}. Name those to learn in config.reward_model.aspects."
                )
            mean.append(math.fsum(values) / len(values))
            std.append(math.sqrt(math.fsum((x - mean[-1]) ** 2 for x in values) / len(values)))
        return cls(names, tuple(mean), tuple(std))

    def targets(self, record) -> dict:
        """Of one completion: {"targets": [1, K], "target_mask": [1, K]}."""
        known = [name in record.ratings for name in self.names]
        scaled = zip(self.names, self.mean, self.std, strict=True)
        values = [(record.ratings[n] - m) / s if n in record.ratings else 0.0 for n, m, s in scaled]
        return {"targets": [values], "target_mask": [[float(x) for x in known]]}


@dataclasses.dataclass(frozen=True)
class Known:
    """What a group is made with beside its record."""

    settings: Settings  # RewardModelSettings
    scale: Scale | None = None  # of ratings
    soft: bool = False  # every pair has a soft label

    @classmethod
    def of(cls, settings, records, scale: Scale | None = None) -> "Known":
        soft = bool(settings.label_smoothing)
        soft = soft or any(getattr(record, "soft_label", None) is not None for record in records)
        return cls(settings, scale, soft)


# Groups


def pairwise_group(known, pair):
    extras = {}
    if known.soft:
        right = 1.0 - known.settings.label_smoothing
        extras["soft_labels"] = right if pair.soft_label is None else pair.soft_label
    if known.settings.margin_coeff:
        extras["margins"] = known.settings.margin_coeff * margin_of(pair)
    return pair.prompt, (pair.chosen, pair.rejected), pair.row, extras


def margin_of(pair) -> float:
    """How much better the chosen completion was rated, by the record's `margin` or its two scores; 0 if nobody says."""
    fields = {} if pair.row is None else pair.row.fields
    if isinstance(fields.get("margin"), int | float):
        return float(fields["margin"])
    scores = [fields.get(name) for name in ("score_chosen", "score_rejected")]
    return float(scores[0] - scores[1]) if all(isinstance(x, int | float) for x in scores) else 0.0


def ranking_group(known, ranking):
    count, extras = len(ranking.completions), {}
    if known.settings.ranking_loss == "pairs":
        rated = ranking.ratings is not None
        extras = {
            "targets": [[x] for x in (ranking.ratings if rated else [0.0] * count)],
            "target_mask": [[float(rated)]] * count,
        }
    return ranking.prompt, ranking.completions, ranking.row, extras


def labelled_group(known, record):
    extras = {"targets": [[float(record.accepted)]], "target_mask": [[1.0]]}
    return record.prompt, (record.completion,), record.row, extras


def rated_group(known, record):
    return record.prompt, (record.completion,), record.row, known.scale.targets(record)


# Pairs


def both_of_pairs(records, scale=None):
    return [((i, 0), (i, 1)) for i in range(len(records))]


def pairs_of_rankings(records, scale=None):
    """All of each ranking but ties in its ratings."""
    found = []
    for n, record in enumerate(records):
        ratings = record.ratings or range(len(record.completions), 0, -1)
        found += [
            ((n, i), (n, j))
            for i in range(len(ratings))
            for j in range(i + 1, len(ratings))
            if ratings[i] > ratings[j]
        ]
    return found


def same_prompt(records, gap) -> list:
    """[(better, worse)] of records of one completion: those of the same prompt whose gap(one, other) is not 0."""
    by_prompt, found = {}, []
    for n, record in enumerate(records):
        by_prompt.setdefault(formats.readable(record.prompt), []).append(n)
    for same in by_prompt.values():
        for place, i in enumerate(same):
            for j in same[place + 1 :]:
                by = gap(records[i], records[j])
                if by:
                    found.append(((i, 0), (j, 0)) if by > 0 else ((j, 0), (i, 0)))
    return found


def pairs_of_labels(records, scale=None):
    return same_prompt(records, lambda one, other: one.accepted - other.accepted)


def pairs_of_ratings(records, scale: Scale):
    """By the mean of the learned aspects that both have, each in its own deviations."""

    def gap(one, other):
        shared = [
            (one.ratings[name] - other.ratings[name]) / std
            for name, std in zip(scale.names, scale.std, strict=True)
            if name in one.ratings and name in other.ratings
        ]
        return sum(shared) / len(shared) if shared else 0.0

    return same_prompt(records, gap)
