"""Completions that somebody compared, accepted, rated or ranked: rows to records.

Each function reads one format, which formats.py names; it may count on its fields being there and on nothing else."""

from collections.abc import Callable

from rlhf_jax.data import conversations
from rlhf_jax.data.fields import FieldError, boolean, choice, probability, rating, shown, text, text_of
from rlhf_jax.data.records import Labelled, Pair, Ranking, Rated
from rlhf_jax.data.sources import Row

# Columns that hold ratings; others with numbers may be anything.
ASPECTS = ("overall", "score", "rating", "helpfulness", "correctness", "coherence", "complexity", "verbosity",
           "instruction_following", "honesty", "truthfulness", "harmlessness", "safety")  # fmt: skip

# --- compared


def vertex(prompt: Callable[[Row], object]) -> Callable[[Row], Pair]:
    """Two candidates and the index of the better one, after whatever prompt."""

    def parse(row):
        asked = prompt(row)
        candidates = [text(row, "candidate_0"), text(row, "candidate_1")]
        better = choice(row, "choice")
        return Pair(asked, candidates[better], candidates[1 - better], row=row)

    return parse


def chosen_and_rejected(row: Row) -> Pair:
    """Text, one message each, or whole conversations, in which the prompt comes again."""
    asked = conversations.prompt(row, "prompt")
    soft_label = probability(row, "soft_label")
    whole = [row.fields[field] for field in ("chosen", "rejected")]
    if all(isinstance(value, list) and len(value) > 1 for value in whole):
        found, better, worse = conversations.compared(row, "chosen", "rejected")
        said = [message["content"] for message in found]
        if asked not in said if isinstance(asked, str) else asked != found:
            raise FieldError("prompt", f"is {shown(asked)}, which the conversation of 'chosen' does not have")
        return Pair(found, better, worse, soft_label, row)
    better, worse = (conversations.completion(row, field) for field in ("chosen", "rejected"))
    return Pair(asked, better, worse, soft_label, row)


def whole_conversations(row: Row) -> Pair:
    return Pair(*conversations.compared(row, "chosen", "rejected"), probability(row, "soft_label"), row)


def whole_transcripts(row: Row) -> Pair:
    return Pair(*conversations.transcripts(row, "chosen", "rejected"), probability(row, "soft_label"), row)


def replies(row: Row) -> Pair:
    """A conversation and the two messages that could follow it."""
    asked = conversations.prompt(row, "conversations")
    better, worse = (conversations.completion(row, field) for field in ("chosen", "rejected"))
    return Pair(asked, better, worse, probability(row, "soft_label"), row)


# --- accepted or not


def labelled_completion(row: Row) -> Labelled:
    asked, completion = conversations.prompt(row, "prompt"), conversations.completion(row, "completion")
    return Labelled(asked, completion, boolean(row, "label"), row)


def labelled_conversation(field: str) -> Callable[[Row], Labelled]:
    def parse(row):
        asked, completion = conversations.up_to_the_last_reply(row, field, judged=True)
        return Labelled(asked, completion, boolean(row, "label"), row)

    return parse


# --- rated


def has_ratings(fields: dict) -> bool:
    return "ratings" in fields or any(aspect in fields for aspect in ASPECTS)


def rated(completion: str) -> Callable[[Row], Rated]:
    """Ratings in columns of their own, or in an object `ratings`."""

    def parse(row):
        asked, completed = conversations.prompt(row, "prompt"), conversations.completion(row, completion)
        return Rated(asked, completed, _ratings(row), row)

    return parse


def _ratings(row: Row) -> dict[str, float]:
    columns, field = {name: row.fields[name] for name in ASPECTS if name in row.fields}, ""
    if "ratings" in row.fields:
        columns, field = row.fields["ratings"], "ratings"
        if not isinstance(columns, dict):
            raise FieldError(field, f'is {shown(columns)}; expected an object such as {{"helpfulness": 4}}')
    if not columns:
        raise FieldError("ratings", f"is missing, and so are columns with ratings: {', '.join(ASPECTS)}")
    found = {
        name: rating(value, field or name, f"{name!r} " if field else "", digits=row.untyped)
        for name, value in columns.items()
    }
    return _at_least_one(found, field or next(iter(columns)))


def ultrafeedback(row: Row) -> list[Rated]:
    """One record a completion that has a rating. Where there are ratings of aspects, these alone: `overall_score` of
    the published data has 10 in the place of 1 here and there."""
    asked = [{"role": "user", "content": text(row, "instruction")}]
    found, records = row.fields["completions"], []
    if not isinstance(found, list) or not found:
        raise FieldError("completions", f"is {shown(found)}; expected a list of completions")
    for number, one in enumerate(found, 1):
        what = f"completion {number} "
        if not isinstance(one, dict) or "response" not in one:
            raise FieldError("completions", f"{what}is {shown(one)}; expected an object with 'response'")
        completion = text_of(one["response"], "completions", what + "'response' ")
        if ratings := _annotated(one, what):
            records.append(Rated(asked, completion, ratings, row))
    if not records:
        raise FieldError("completions", "has no rating in 'annotations' or 'overall_score'")
    return records


def _annotated(completion: dict, what: str) -> dict[str, float]:
    annotations = completion.get("annotations") or {}
    if not isinstance(annotations, dict):
        raise FieldError("completions", f"{what}'annotations' is {shown(annotations)}; expected an object")
    found = {name: one.get("Rating") for name, one in annotations.items() if isinstance(one, dict)}
    read = lambda name, value: rating(value, "completions", f"{what}{name!r} ", digits=True)
    ratings = {name: read(name, value) for name, value in found.items()}
    ratings = {name: value for name, value in ratings.items() if value is not None}
    if not ratings and (overall := read("overall_score", completion.get("overall_score"))) is not None:
        ratings = {"overall": overall}
    return ratings


def _at_least_one(ratings: dict, field: str) -> dict[str, float]:
    kept = {name: value for name, value in ratings.items() if value is not None}
    if not kept:
        raise FieldError(field, f"has no rating, and neither has another of {', '.join(ratings)}")
    return kept


# --- ranked


def ranked(row: Row) -> Ranking:
    """`completions` best first, or in any order with as many `ratings`."""
    asked, found = conversations.prompt(row, "prompt"), row.fields["completions"]
    if not isinstance(found, list) or len(found) < 2:
        raise FieldError("completions", f"is {shown(found)}; expected a list of two or more, the best first")
    texts = [text_of(one, "completions", f"completion {number} ") for number, one in enumerate(found, 1)]
    given = row.fields.get("ratings")
    if given is None:
        return Ranking(asked, tuple(texts), row=row)
    if not isinstance(given, list) or len(given) != len(texts):
        raise FieldError(
            "ratings", f"is {shown(given)}; expected a list of {len(texts)} numbers, one a completion"
        )
    ratings = [rating(value, "ratings", f"number {number} ") for number, value in enumerate(given, 1)]
    if None in ratings:
        raise FieldError("ratings", f"has null in place {ratings.index(None) + 1}; leave that completion out")
    order = sorted(range(len(texts)), key=lambda i: -ratings[i])
    return Ranking(asked, tuple(texts[i] for i in order), tuple(ratings[i] for i in order), row)
