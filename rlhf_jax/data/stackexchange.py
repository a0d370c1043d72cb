"""StackExchange: questions whose answers people voted on.

Score: Askell et al. 2021, "A General Language Assistant as a Laboratory for Alignment", arXiv:2112.00861, section 4.1.
Text around question and answer: StackLLaMA's (Beeching et al. 2023). Answers stay as they are, HTML included."""

import math

from rlhf_jax.data.fields import FieldError, rating, shown, text, text_of
from rlhf_jax.data.records import Pair, Rated
from rlhf_jax.data.sources import Row


def score(upvotes: int, accepted: bool = False) -> int:
    """round(log2(1 + upvotes)), one more if the asker accepted the answer; -1 for negative upvotes, accepted or not."""
    return -1 if upvotes < 0 else round(math.log2(1 + upvotes)) + bool(accepted)


def prompt(row: Row) -> str:
    return f"Question: {text(row, 'question')}\n\nAnswer:"


def answers(row: Row) -> list[Rated]:
    """One record an answer: rated with its `pm_score`, which is such a score, or the score of its `upvotes` and
    `selected`."""
    found, records = row.fields["answers"], []
    if not isinstance(found, list) or not found:
        raise FieldError("answers", f"is {shown(found)}; expected a list of answers")
    for number, answer in enumerate(found, 1):
        what = f"answer {number} "
        if (
            not isinstance(answer, dict)
            or "text" not in answer
            or not {"pm_score", "upvotes"} & answer.keys()
        ):
            raise FieldError(
                "answers",
                f"{what}is {shown(answer)}; expected an object with 'text' and 'pm_score' or 'upvotes'",
            )
        completion = " " + text_of(answer["text"], "answers", what + "'text' ")
        records.append(Rated(prompt(row), completion, {"score": _score(answer, what)}, row))
    return records


def _score(answer: dict, what: str) -> float:
    name = "pm_score" if answer.get("pm_score") is not None else "upvotes"
    value = rating(answer.get(name), "answers", f"{what}{name!r} ")
    accepted = answer.get("selected")
    if value is None or value != int(value):
        raise FieldError("answers", f"{what}{name!r} is {shown(answer.get(name))}; expected a whole number")
    if name == "pm_score":
        return value
    if accepted is not None and type(accepted) is not bool:
        raise FieldError("answers", f"{what}'selected' is {shown(accepted)}; expected true or false")
    return float(score(int(value), bool(accepted)))


def paired(row: Row) -> Pair:
    """Rows of lvwerra/stack-exchange-paired: `response_j` has the higher score."""
    better, worse = (" " + text(row, field) for field in ("response_j", "response_k"))
    return Pair(prompt(row), better, worse, row=row)
