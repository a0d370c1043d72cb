"""Rows to records: which format a file has, and the readers of each kind of record.

A format is recognised by its field names, file by file; each is one line of a table, so a new one is a function and a
line. A reader takes every format that holds its kind of record, or another that it can be derived from. A record that
does not fit is named by file, line and field. Knows nothing of tokens."""

import collections
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

from rlhf_jax.data import asked, conversations, conversions, judged, stackexchange, summaries
from rlhf_jax.data.fields import FieldError, shown
from rlhf_jax.data.records import (
    INSTRUCTION_SEPARATOR,
    Example,
    Labelled,
    Messages,
    Pair,
    Prompt,
    Ranking,
    Rated,
    instructed,
    readable,
    source_of,
)
from rlhf_jax.data.sources import BadRecord, Row, check_bad_records
from rlhf_jax.errors import InputError

__all__ = ["INSTRUCTION_SEPARATOR", "Example", "FieldError", "Format", "Labelled", "Messages", "Pair", "Prompt",
           "Ranking", "Rated", "examples", "instructed", "labelled", "pairs", "pairs_or_labelled", "prompts",
           "rankings", "rated", "readable", "recognise", "source_of"]  # fmt: skip

LOG = logging.getLogger("rlhf_jax.data")


@dataclasses.dataclass(frozen=True)
class Format:
    """`parse(row)` gives a record or several, or raises FieldError. It may count on nothing but `fields`."""

    name: str
    fields: tuple[str, ...]
    parse: Callable[[Row], object]
    record: type = Prompt  # what it gives
    fits: Callable[[dict], bool] = lambda fields: (
        True
    )  # of a row with all fields, where names alone do not tell
    once: bool = False  # rows with an equal prompt count once


# Where a file has the fields of several, the one with the most counts, then the first.
PROMPT_FORMATS = (
    Format("Vertex prompts", ("input_text",), asked.prompt("input_text")),
    Format("prompts", ("prompt",), asked.prompt("prompt")),
    Format("prompts with a ground truth", ("prompt", "reward_model"), asked.verifiable_prompt),
    Format("prompts of rated responses", ("prompt", "response"), asked.prompt("prompt"), once=True),
    Format("questions", ("question",), asked.question),
    Format("questions and answers", ("question", "answer"), asked.checkable_question),
    Format("StackExchange questions", ("question", "answers"), asked.prompt_of(stackexchange.answers)),
    Format("StackExchange questions", ("question", "response_j", "response_k"),
           asked.prompt_of(stackexchange.paired), once=True),
    Format("instructions", ("instruction",), asked.instruction_prompt),
    Format("Alpaca", ("instruction", "input"), asked.alpaca_prompt),
    Format("Alpaca", ("instruction", "output"), asked.alpaca_prompt),
    Format("conversations", ("messages",), asked.conversation_prompt("messages")),
    Format("ShareGPT conversations", ("conversations",), asked.conversation_prompt("conversations")),
    Format("HH-RLHF transcripts", ("chosen", "rejected"), asked.prompt_of(judged.whole_transcripts), once=True,
           fits=lambda fields: _both(fields, conversations.is_transcript)),
    Format("chosen and rejected conversations", ("chosen", "rejected"), asked.prompt_of(judged.whole_conversations),
           once=True, fits=lambda fields: _both(fields, _is_list)),
    Format("summarize_from_feedback comparisons", ("info", "summaries", "choice"),
           asked.prompt_of(summaries.comparison), once=True),
)  # fmt: skip
JUDGED_FORMATS = (
    Format("Vertex preferences", ("input_text", "candidate_0", "candidate_1", "choice"),
           judged.vertex(lambda row: conversations.prompt(row, "input_text")), Pair),
    Format("Vertex chat preferences", ("messages", "candidate_0", "candidate_1", "choice"),
           judged.vertex(lambda row: conversations.prompt(row, "messages")), Pair),
    Format("chosen and rejected completions", ("prompt", "chosen", "rejected"), judged.chosen_and_rejected, Pair),
    Format("ShareGPT preferences", ("conversations", "chosen", "rejected"), judged.replies, Pair),
    Format("HH-RLHF transcripts", ("chosen", "rejected"), judged.whole_transcripts, Pair,
           lambda fields: _both(fields, conversations.is_transcript)),
    Format("chosen and rejected conversations", ("chosen", "rejected"), judged.whole_conversations, Pair,
           lambda fields: _both(fields, _is_list)),
    Format("summarize_from_feedback comparisons", ("info", "summaries", "choice"), summaries.comparison, Pair),
    Format("pairs of StackExchange answers", ("question", "response_j", "response_k"), stackexchange.paired, Pair),
    Format("labelled completions", ("prompt", "completion", "label"), judged.labelled_completion, Labelled),
    Format("labelled conversations", ("messages", "label"), judged.labelled_conversation("messages"), Labelled),
    Format("labelled ShareGPT conversations", ("conversations", "label"),
           judged.labelled_conversation("conversations"), Labelled),
    Format("rated responses", ("prompt", "response"), judged.rated("response"), Rated, judged.has_ratings),
    Format("rated completions", ("prompt", "completion"), judged.rated("completion"), Rated, judged.has_ratings),
    Format("UltraFeedback", ("instruction", "completions"), judged.ultrafeedback, Rated),
    Format("summarize_from_feedback ratings", ("info", "summary"), summaries.axes, Rated),
    Format("StackExchange answers", ("question", "answers"), stackexchange.answers, Rated),
    Format("ranked completions", ("prompt", "completions"), judged.ranked, Ranking),
)  # fmt: skip
EXAMPLE_FORMATS = (
    Format("Vertex examples", ("input_text", "output_text"), asked.example("input_text", "output_text"), Example),
    Format("completions", ("prompt", "completion"), asked.example("prompt", "completion"), Example),
    Format("texts", ("text",), asked.plain_text, Example),
    Format("Alpaca", ("instruction", "output"), asked.alpaca, Example),
    Format("conversations", ("messages",), asked.conversation_example("messages"), Example),
    Format("ShareGPT conversations", ("conversations",), asked.conversation_example("conversations"), Example),
    Format("questions and answers", ("question", "answer"), asked.solved_question, Example),
)  # fmt: skip


def prompts(rows: Sequence[Row], *, instruction: str = "", max_bad_records: float = 0.0) -> list[Prompt]:
    """What completions are sampled for, from PROMPT_FORMATS. Where a format gives the field `answer` another form, the
    record's row has that one. See `_read` for the arguments."""
    return _read(rows, PROMPT_FORMATS, {Prompt: None}, instruction, max_bad_records)


def pairs(
    rows: Sequence[Row],
    *,
    instruction: str = "",
    max_bad_records: float = 0.0,
    which: str = "all",
    by: str = "",
    per_prompt: int = 10,
    seed: int = 0,
) -> list[Pair]:
    """Preferences, given as such, or by different ratings, by a ranking, or by a label of completions of one prompt.

    See `_read` for `instruction` and `max_bad_records`; `which` (all, best), `by` (an aspect), `per_prompt` and `seed`
    are those of conversions.py. They matter to ratings and labels; rankings given as such give all (or the best's)
    pairs, as InstructGPT's do.
    """
    options = dict(which=which, per_prompt=per_prompt, seed=seed)
    derived = {
        Pair: None,
        Ranking: functools.partial(conversions.pairs_of_rankings, which=which, per_prompt=0),
        Rated: functools.partial(conversions.pairs_of_rated, by=by, **options),
        Labelled: functools.partial(conversions.pairs_of_labelled, **options),
    }
    records = _read(rows, JUDGED_FORMATS, derived, instruction, max_bad_records)
    if same := sum(pair.chosen == pair.rejected for pair in records):
        LOG.warning("%d of %d pairs have two equal candidates; they teach nothing.", same, len(records))
    return records


def labelled(rows: Sequence[Row], *, instruction: str = "", max_bad_records: float = 0.0) -> list[Labelled]:
    """Completions accepted or not: given as such, or the two sides of pairs. See `_read` for the arguments."""
    derived = {Labelled: None, Pair: conversions.labelled_of_pairs}
    return _read(rows, JUDGED_FORMATS, derived, instruction, max_bad_records)


def pairs_or_labelled(rows: Sequence[Row], **options) -> list[Pair] | list[Labelled]:
    """Labelled completions where a source has labels, else pairs. options: what both readers take."""
    by_source = collections.defaultdict(list)
    for row in rows:
        by_source[row.source].append(row)
    kinds = {recognise(of_source, JUDGED_FORMATS).record for of_source in by_source.values()}
    return (labelled if Labelled in kinds else pairs)(rows, **options)


def rated(rows: Sequence[Row], *, instruction: str = "", max_bad_records: float = 0.0) -> list[Rated]:
    """Completions with ratings of one or more aspects. See `_read` for the arguments."""
    return _read(rows, JUDGED_FORMATS, {Rated: None}, instruction, max_bad_records)


def rankings(
    rows: Sequence[Row], *, instruction: str = "", max_bad_records: float = 0.0, by: str = ""
) -> list[Ranking]:
    """Completions of a prompt in order: given as such, by their ratings (`by`: the aspect, as in conversions.py), or
    the two of a pair. See `_read` for the other arguments."""
    derived = {
        Ranking: None,
        Rated: functools.partial(conversions.rankings_of_rated, by=by),
        Pair: conversions.rankings_of_pairs,
    }
    return _read(rows, JUDGED_FORMATS, derived, instruction, max_bad_records)


def examples(rows: Sequence[Row], *, instruction: str = "", max_bad_records: float = 0.0) -> list[Example]:
    """Completions to imitate: given as such, or those that were chosen or accepted. See `_read` for the arguments."""
    derived = {Example: None, Pair: conversions.examples_of_pairs, Labelled: conversions.examples_of_labelled}
    return _read(rows, (*EXAMPLE_FORMATS, *JUDGED_FORMATS), derived, instruction, max_bad_records)


def _read(rows, formats, derived, instruction, max_bad_records):
    """The records of the good rows, source by source.

    Args:
      rows: of any number of sources; the format is recognised in each by itself.
      formats: the table to look in.
      derived: {kind of record: what makes a list of them one of the wanted kind, None where it is that kind}.
      instruction: text put before each prompt.
      max_bad_records: the fraction of rows to put up with that do not fit; more is an InputError.
    """
    by_source = collections.defaultdict(list)
    for row in rows:
        by_source[row.source].append(row)
    formats = [form for form in formats if form.record in derived]
    found, bad, told = [], [], []
    for source, of_source in by_source.items():
        form = recognise(of_source, formats)
        records = [_instructed(instruction, one) for one in _parsed(form, of_source, bad)]
        if form.once:
            texts = {}
            for one in records:
                texts.setdefault(repr(one.text), one)
            records = list(texts.values())
        said = f"{source}: {len(of_source)} rows of {form.name} ({', '.join(form.fields)})"
        convert = derived[form.record]
        if convert is not None:
            count, records = len(records), convert(records)
            said += (
                f", {count} {form.record.__name__.lower()} records, {len(records)} records derived from them"
            )
        LOG.info("%s", said)
        told.append(said)
        found += records
    check_bad_records(bad, len(rows), max_bad_records)
    if not found:
        raise InputError("No record is left to use. " + "; ".join(told))
    return found


def _parsed(form: Format, rows: Sequence[Row], bad: list[BadRecord]) -> list:
    """The records of the rows that fit; what does not is added to `bad`."""
    records = []
    for row in rows:
        try:
            for field in form.fields:
                if field not in row.fields:
                    raise FieldError(
                        field, f"is missing; a line of {form.name} holds {', '.join(form.fields)}"
                    )
            made = form.parse(row)
        except FieldError as error:
            bad.append(BadRecord(row.source, row.line, error.field, error.reason))
        else:
            records += made if isinstance(made, list) else [made]
    return records


def _instructed(instruction: str, record):
    field = "text" if isinstance(record, Prompt) else "prompt"
    return dataclasses.replace(record, **{field: instructed(instruction, getattr(record, field))})


def recognise(rows: Sequence[Row], formats: Sequence[Format]) -> Format:
    """The format that the most rows have whole, then the one whose fields occur most.

    Raises: InputError where no row has a format whole and no format has more than half of its fields.
    """

    def fit(form: Format) -> tuple[int, int]:
        whole = sum(
            all(field in row.fields for field in form.fields) and form.fits(row.fields) for row in rows
        )
        return whole, sum(field in row.fields for row in rows for field in form.fields)

    best = max(formats, key=fit)  # the first among equals
    whole, present = fit(best)
    if not whole and 2 * present <= len(best.fields) * len(rows):
        known = "; ".join(dict.fromkeys(", ".join(form.fields) for form in formats))
        found = ", ".join(shown(name) for name in list(rows[0].fields)[:12]) or "none"
        raise InputError(
            f"{rows[0].source}, line {rows[0].line}: the fields are {found}; expected one of: {known}. "
            "Rename the fields or convert the file."
        )
    return best


def _both(fields: dict, holds: Callable[[object], bool]) -> bool:
    return holds(fields["chosen"]) and holds(fields["rejected"])


def _is_list(value) -> bool:
    return isinstance(value, list)
