"""openai/summarize_from_feedback: people's comparisons and ratings of summaries (Stiennon et al. 2020,
arXiv:2009.01325). A prompt is the paper's query; a summary follows its "TL;DR:" after a space."""

from rlhf_jax.data.fields import FieldError, choice, rating, shown, text_of
from rlhf_jax.data.records import Pair, Rated
from rlhf_jax.data.sources import Row

POST = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
ARTICLE = "Article:\n{article}\n\nTL;DR:"


def prompt(row: Row) -> str:
    info = _object(row.fields["info"], "info", "")
    form, fields = (POST, ("subreddit", "title", "post")) if info.get("post") else (ARTICLE, ("article",))
    return form.format(**{name: text_of(info.get(name), "info", f"{name!r} ") for name in fields})


def comparison(row: Row) -> Pair:
    summaries = row.fields["summaries"]
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise FieldError("summaries", f"is {shown(summaries)}; expected a list of two")
    texts = [_summary(one, "summaries", f"summary {number} ") for number, one in enumerate(summaries)]
    better = choice(row, "choice")
    return Pair(prompt(row), texts[better], texts[1 - better], row=row)


def axes(row: Row) -> Rated:
    summary = row.fields["summary"]
    completion = _summary(summary, "summary", "")
    found = _object(summary.get("axes"), "summary", "'axes' ")
    ratings = {name: rating(value, "summary", f"{name!r} ") for name, value in found.items()}
    ratings = {name: value for name, value in ratings.items() if value is not None}
    if not ratings:
        raise FieldError("summary", "has no rating in its 'axes'")
    return Rated(prompt(row), completion, ratings, row)


def _summary(value, field, what):
    found = text_of(_object(value, field, what).get("text"), field, what + "'text' ")
    return found if found[0].isspace() else " " + found


def _object(value, field, what):
    if not isinstance(value, dict):
        raise FieldError(field, f"{what}is {shown(value)}; expected an object")
    return value
