"""What a line of a data set says, whatever its format was: the nouns of this room.

A prompt is text or messages; a completion is text. Knows no field names, files or tokens."""

import dataclasses

from rlhf_jax.data.sources import Row

# Between an instruction and the input. Three line ends, as in the prompts that Vertex's RLHF pipeline made.
INSTRUCTION_SEPARATOR = "\n\n\n"
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


def readable(prompt: str | Messages) -> str:
    """A prompt for people to read: text as it is, messages with their roles."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def source_of(record) -> str:
    """Where a record comes from, to report figures by: the field `source` or `dataset` of its row if that is text,
    else the file or data set; empty for a record without a row."""
    if record.row is None:
        return ""
    named = (record.row.fields.get(field) for field in ("source", "dataset"))
    return next((name for name in named if isinstance(name, str) and name.strip()), record.row.source)


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
