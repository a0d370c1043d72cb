"""Rows of the run's own labels, ratings and rankings, as the stage `preferences` writes them, to records."""

from collections.abc import Sequence

from rlhf_jax.data.formats import Labelled, Ranking, Rated, Row, instructed
from rlhf_jax.errors import InputError


def labelled(rows: Sequence[Row], *, instruction: str = "", max_bad_records: float = 0.0) -> list[Labelled]:
    """{"prompt", "completion", "label": true or false} a row."""
    _need(rows, "prompt", "completion", "label")
    return [
        Labelled(instructed(instruction, r.fields["prompt"]), r.fields["completion"], r.fields["label"], r)
        for r in rows
    ]


def rated(rows: Sequence[Row], *, instruction: str = "", max_bad_records: float = 0.0) -> list[Rated]:
    """{"prompt", "completion", "ratings": {aspect: number or null}} a row."""
    _need(rows, "prompt", "completion", "ratings")
    known = lambda ratings: {name: float(x) for name, x in ratings.items() if x is not None}
    return [
        Rated(
            instructed(instruction, r.fields["prompt"]), r.fields["completion"], known(r.fields["ratings"]), r
        )
        for r in rows
    ]


def rankings(rows: Sequence[Row], *, instruction: str = "", max_bad_records: float = 0.0) -> list[Ranking]:
    """{"prompt", "completions": [...], "ratings": [...]} a row."""
    _need(rows, "prompt", "completions", "ratings")
    return [_ranking(r, instruction) for r in rows]


def _ranking(row: Row, instruction: str) -> Ranking:
    order = sorted(zip(row.fields["ratings"], row.fields["completions"], strict=True), key=lambda x: -x[0])
    ratings, completions = zip(*order, strict=True)
    return Ranking(instructed(instruction, row.fields["prompt"]), completions, ratings, row)


def _need(rows, *fields):
    for row in rows:
        missing = [name for name in fields if name not in row.fields]
        if missing:
            raise InputError(
                f"{row.source}, line {row.line}: {missing[0]!r} is missing; expected {', '.join(fields)}."
            )
