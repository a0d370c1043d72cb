"""Rows to records: what the fields of a preference, prompt or example file mean.

A format is recognised by its field names, file by file; each is one line of a table, so a new one is a
function and a line. A record that does not fit is named by file, line and field. Knows nothing of tokens."""

import collections
import dataclasses
import re
import reprlib
from collections.abc import Callable, Sequence

from absl import logging

from rlhf_jax.data.sources import BadRecord, Row, check_bad_records
from rlhf_jax.errors import InputError

# Between an instruction and the input. Three line ends, as in the prompts that Vertex's RLHF pipeline made.
INSTRUCTION_SEPARATOR = "\n\n\n"
NUMBER = re.compile(r"[0-9]*\.?[0-9]+")
ROLES = ("system", "user", "assistant")
Messages = list[dict]  # [{"role": ..., "content": ...}], for the chat template of the tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a completion is sampled for."""

    text: str | Messages
    row: Row | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two completions of a prompt, the better one first."""

    prompt: str | Messages
    chosen: str
    rejected: str
    soft_label: float | None = None  # probability that `chosen` is the better one; None: no doubt
    row: Row | None = None


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A completion that somebody accepted or did not."""

    prompt: str | Messages
    completion: str
    accepted: bool
    row: Row | None = None


@dataclasses.dataclass(frozen=True)
class Rated:
    """A completion with human scores, higher is better. An aspect without a score is not in `ratings`."""

    prompt: str | Messages
    completion: str
    ratings: dict[str, float]
    row: Row | None = None


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Completions of a prompt, best first, and, where they are known, what each was given."""

    prompt: str | Messages
    completions: tuple[str, ...]
    ratings: tuple[float, ...] | None = None
    row: Row | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with the completion to imitate. An empty prompt: plain text, all of it to be learned."""

    prompt: str | Messages
    completion: str
    row: Row | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """`parse(row)` gives a record, or raises FieldError; it may count on nothing but `fields` being there."""

    name: str
    fields: tuple[str, ...]
    parse: Callable[[Row], Prompt | Pair | Example]


class FieldError(ValueError):
    """A field that does not hold what its format says."""

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason


def readable(prompt: str | Messages) -> str:
    """A prompt for people to read: text as it is, messages with their roles."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


# --- fields


def _text(row: Row, field: str) -> str:
    value = row.fields[field]
    if not isinstance(value, str):
        raise FieldError(field, f"is {_shown(value)}; expected a string")
    if not value.strip():
        raise FieldError(field, "is empty; expected text")
    return value


def _prompt(row: Row, field: str) -> str | Messages:
    """Text, or the messages of a conversation up to the one to be written."""
    if not isinstance(row.fields[field], list):
        return _text(row, field)
    messages = _messages(row, field)
    if messages[-1]["role"] == "assistant":
        raise FieldError(field, "ends with a message of the assistant, which is the one to be written")
    return messages


def _completion(row: Row, field: str) -> str:
    """Text, or a list with one message of the assistant."""
    if not isinstance(row.fields[field], list):
        return _text(row, field)
    messages = _messages(row, field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise FieldError(field, f"has {len(messages)} messages; expected one, of the assistant")
    return messages[0]["content"]


def _messages(row: Row, field: str) -> Messages:
    messages = row.fields[field]
    if not messages:
        raise FieldError(field, "is an empty list; expected messages")
    for number, message in enumerate(messages, 1):
        what = f"message {number} is {_shown(message)}; expected "
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise FieldError(field, what + "an object with 'role' and 'content'")
        if message["role"] not in ROLES:
            raise FieldError(field, what + f"a 'role' among {', '.join(ROLES)}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise FieldError(field, what + "text as 'content'")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _choice(row: Row, field: str) -> int:
    value = row.fields[field]
    if row.untyped and value in ("0", "1"):
        value = int(value)
    if type(value) is not int or value not in (
        0,
        1,
    ):  # True and 1.0 equal 1, but somebody meant something else
        raise FieldError(field, f"is {_shown(value)}; expected 0 or 1, the index of the better candidate")
    return value


def _probability(row: Row, field: str) -> float | None:
    value = row.fields.get(field)
    if row.untyped:
        value = float(value) if NUMBER.fullmatch(value or "") else value or None
    if value is not None and (type(value) not in (int, float) or not 0.0 <= value <= 1.0):
        raise FieldError(
            field, f"is {_shown(value)}; expected a probability between 0 and 1, or no such field"
        )
    return value


def _shown(value) -> str:
    """A short repr: control characters and half characters in it are escaped."""
    return "null" if value is None else _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong, _SHORT.maxlevel, _SHORT.maxlist = 60, 60, 60, 3, 4


# --- formats


def _vertex_pair(row: Row) -> Pair:
    prompt = _text(row, "input_text")
    candidates = [_text(row, "candidate_0"), _text(row, "candidate_1")]
    choice = _choice(row, "choice")
    return Pair(prompt, candidates[choice], candidates[1 - choice], row=row)


def _plain_pair(row: Row) -> Pair:
    prompt, chosen, rejected = (
        _prompt(row, "prompt"),
        _completion(row, "chosen"),
        _completion(row, "rejected"),
    )
    return Pair(prompt, chosen, rejected, _probability(row, "soft_label"), row)


def _example_of(prompt: str, completion: str) -> Callable[[Row], Example]:
    return lambda row: Example(_prompt(row, prompt), _completion(row, completion), row)


# Where a file has the fields of several, the first counts.
PROMPT_FORMATS = (
    Format("Vertex prompts", ("input_text",), lambda row: Prompt(_prompt(row, "input_text"), row)),
    Format("prompts", ("prompt",), lambda row: Prompt(_prompt(row, "prompt"), row)),
)
PAIR_FORMATS = (
    Format("Vertex preferences", ("input_text", "candidate_0", "candidate_1", "choice"), _vertex_pair),
    Format("chosen and rejected completions", ("prompt", "chosen", "rejected"), _plain_pair),
)
EXAMPLE_FORMATS = (
    Format("Vertex examples", ("input_text", "output_text"), _example_of("input_text", "output_text")),
    Format("completions", ("prompt", "completion"), _example_of("prompt", "completion")),
    Format("texts", ("text",), lambda row: Example("", _text(row, "text"), row)),
)


def prompts(rows: Sequence[Row], *, instruction: str = "", max_bad_records: float = 0.0) -> list[Prompt]:
    """Prompts from `input_text` or `prompt`: text, or messages. See `_records` for the arguments."""
    return _records(rows, PROMPT_FORMATS, "text", instruction, max_bad_records)


def pairs(rows: Sequence[Row], *, instruction: str = "", max_bad_records: float = 0.0) -> list[Pair]:
    """Preferences from Vertex's `input_text`, `candidate_0`, `candidate_1` and `choice`, or from `prompt`,
    `chosen`, `rejected` and, if it is there, `soft_label`. See `_records` for the arguments."""
    records = _records(rows, PAIR_FORMATS, "prompt", instruction, max_bad_records)
    if same := sum(pair.chosen == pair.rejected for pair in records):
        logging.warning("%d of %d pairs have two equal candidates; they teach nothing.", same, len(records))
    return records


def examples(rows: Sequence[Row], *, instruction: str = "", max_bad_records: float = 0.0) -> list[Example]:
    """Examples from `input_text`, `output_text` or `prompt`, `completion`, or plain `text`. See `_records`."""
    return _records(rows, EXAMPLE_FORMATS, "prompt", instruction, max_bad_records)


def instructed(instruction: str, prompt: str | Messages) -> str | Messages:
    """`instruction`, three line ends, then the prompt; in a conversation, the first message of the user.

    Plain text, which has no prompt, gets none.
    """
    if not instruction or not prompt:
        return prompt
    if isinstance(prompt, str):
        return instruction + INSTRUCTION_SEPARATOR + prompt
    first = next((i for i, message in enumerate(prompt) if message["role"] == "user"), None)
    if first is None:
        return prompt + [{"role": "user", "content": instruction}]
    content = instruction + INSTRUCTION_SEPARATOR + prompt[first]["content"]
    return prompt[:first] + [{"role": "user", "content": content}] + prompt[first + 1 :]


def _records(rows, formats, prompt_field, instruction, max_bad_records):
    """One record a good row, in order.

    Args:
      rows: of any number of sources; the format is recognised in each by itself.
      formats: the table to look in.
      prompt_field: where a record keeps its prompt.
      instruction: text put before each prompt.
      max_bad_records: the fraction of rows to put up with that do not fit; more is an InputError.
    """
    by_source = collections.defaultdict(list)
    for row in rows:
        by_source[row.source].append(row)
    chosen = {source: recognise(of_source, formats) for source, of_source in by_source.items()}
    for source, form in chosen.items():
        logging.info(
            "%s: %d rows of %s (%s)", source, len(by_source[source]), form.name, ", ".join(form.fields)
        )
    records, bad = [], []
    for row in rows:
        form = chosen[row.source]
        try:
            for field in form.fields:
                if field not in row.fields:
                    raise FieldError(
                        field, f"is missing; a line of {form.name} holds {', '.join(form.fields)}"
                    )
            record = form.parse(row)
        except FieldError as error:
            bad.append(BadRecord(row.source, row.line, error.field, error.reason))
            continue
        prompt = instructed(instruction, getattr(record, prompt_field))
        records.append(dataclasses.replace(record, **{prompt_field: prompt}))
    check_bad_records(bad, len(rows), max_bad_records)
    if not records:
        raise InputError("No record is left to use.")
    return records


def recognise(rows: Sequence[Row], formats: Sequence[Format]) -> Format:
    """The format all of whose fields are in the most rows, then the one whose fields occur most.

    Raises: InputError where no row has a field of any.
    """

    def fit(form: Format) -> tuple[int, int]:
        complete = sum(all(field in row.fields for field in form.fields) for row in rows)
        return complete, sum(field in row.fields for row in rows for field in form.fields)

    best = max(formats, key=fit)  # the first among equals
    if fit(best) == (0, 0):
        known = "; ".join(", ".join(form.fields) for form in formats)
        found = ", ".join(_shown(name) for name in list(rows[0].fields)[:12]) or "none"
        raise InputError(
            f"{rows[0].source}, line {rows[0].line}: the fields are {found}; expected one of: {known}. "
            "Rename the fields or convert the file."
        )
    return best
