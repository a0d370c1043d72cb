"""Conversations however they are written: messages of OpenAI, Vertex (author) and ShareGPT (from, value), and
HH-RLHF's transcripts; and where the prompt ends and the completion begins.

A completion is the last turn of the assistant. Two that are compared differ in nothing else: where an earlier turn
differs too, no prompt can be given to both, and the record is refused. Knows no formats."""

import itertools

from rlhf_jax.data.fields import FieldError, shown, text, text_of
from rlhf_jax.data.records import Messages
from rlhf_jax.data.sources import Row

ROLES = ("system", "user", "assistant")
# (key of who, key of what, {who: role}, the row's field with what the system says)
STYLES = (
    ("role", "content", {role: role for role in ROLES}, None),
    ("author", "content", {role: role for role in ROLES}, "context"),
    ("from", "value", {"system": "system", "human": "user", "user": "user", "gpt": "assistant",
                       "assistant": "assistant", "chatgpt": "assistant"}, "system"),
)  # fmt: skip
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def messages(row: Row, field: str) -> Messages:
    """The conversation of a field, at least one message; before it, what its style keeps in a field for the system."""
    return _messages(row.fields[field], field, row)


def _messages(found, field: str, row: Row, whole: bool = True) -> Messages:
    if not isinstance(found, list):
        raise FieldError(field, f"is {shown(found)}; expected a list of messages")
    if not found:
        raise FieldError(field, "is an empty list; expected messages")
    first = found[0] if isinstance(found[0], dict) else {}
    who, what, roles, system = next((style for style in STYLES if style[0] in first), STYLES[0])
    made = []
    for number, message in enumerate(found, 1):
        wrong = f"message {number} is {shown(message)}; expected "
        if not isinstance(message, dict) or not {who, what} <= message.keys():
            raise FieldError(field, wrong + f"an object with {who!r} and {what!r}")
        if not isinstance(message[who], str) or message[who] not in roles:
            raise FieldError(field, wrong + f"a {who!r} among {', '.join(roles)}")
        if not isinstance(message[what], str) or not message[what].strip():
            raise FieldError(field, wrong + f"text as {what!r}")
        made.append({"role": roles[message[who]], "content": message[what]})
    if whole and system is not None and row.fields.get(system) not in (None, ""):
        made.insert(0, {"role": "system", "content": text(row, system)})
    return made


def prompt(row: Row, field: str) -> str | Messages:
    """Text, or the messages of a conversation up to the one to be written."""
    if not isinstance(row.fields[field], list):
        return text(row, field)
    found = messages(row, field)
    if found[-1]["role"] == "assistant":
        raise FieldError(field, "ends with a message of the assistant, which is the one to be written")
    return found


def reply(row: Row, field: str) -> Messages:
    """One message, or the messages of a whole conversation; text is a message of the assistant."""
    value = row.fields[field]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return [{"role": "assistant", "content": text(row, field)}]
    return _messages(value, field, row, whole=len(value) > 1)


def completion(row: Row, field: str) -> str:
    """Text, or one message of the assistant, in a list or not."""
    found = reply(row, field)
    if len(found) != 1 or found[0]["role"] != "assistant":
        raise FieldError(field, f"has {len(found)} messages; expected one, of the assistant")
    return found[0]["content"]


def up_to_the_last_reply(row: Row, field: str, judged: bool = False) -> tuple[Messages, str]:
    """(what comes before the last message of the assistant, that message). What follows it is left out; where the row
    has a judgement of it (`judged`), nothing may follow."""
    found = messages(row, field)
    last = max((i for i, message in enumerate(found) if message["role"] == "assistant"), default=None)
    if last is None or (judged and last < len(found) - 1):
        raise FieldError(
            field, f"ends with a message of the {found[-1]['role']}; expected one of the assistant"
        )
    if last == 0:
        raise FieldError(field, "begins with its only message of the assistant; nothing asks for it")
    return found[:last], found[last]["content"]


def without_the_last_reply(row: Row, field: str) -> Messages:
    """A conversation as a prompt: a reply at its end, which would be the one to write, is left out."""
    found = messages(row, field)
    found = found[:-1] if found[-1]["role"] == "assistant" else found
    if not found or found[-1]["role"] == "assistant":
        raise FieldError(field, "has no message of the user before the last reply of the assistant")
    return found


def compared(row: Row, chosen: str, rejected: str) -> tuple[Messages, str, str]:
    """(prompt, better reply, worse reply) of two whole conversations with everything but their last reply in common."""
    one, other = reply(row, chosen), reply(row, rejected)
    for field, found in ((chosen, one), (rejected, other)):
        if len(found) < 2 or found[-1]["role"] != "assistant":
            raise FieldError(
                field, "holds no whole conversation: expected messages that end with one of the assistant"
            )
    if one[:-1] != other[:-1]:
        same = sum(
            1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False))
        )
        raise FieldError(
            rejected,
            f"differs from {chosen!r} from message {same + 1} on ({len(one)} and {len(other)} messages); only the last "
            "reply may differ",
        )
    if one[-2]["role"] == "assistant":
        raise FieldError(
            chosen, "ends with two messages of the assistant; expected one after a message of the user"
        )
    return one[:-1], one[-1]["content"], other[-1]["content"]


def transcripts(row: Row, chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, better reply, worse reply) of two of HH-RLHF's transcripts; the prompt and a reply are the transcript.

    The prompt ends with the last "\\n\\nAssistant:", so a reply begins with the space that follows it.
    """
    cuts = []
    for field in (chosen, rejected):
        whole = text(row, field)
        at = whole.rfind(ASSISTANT)
        if at < 0 or HUMAN not in whole[:at]:
            raise FieldError(
                field,
                f"is {shown(whole)}; expected a transcript, {HUMAN!r} ... {ASSISTANT!r} ..., or a field 'prompt'",
            )
        at += len(ASSISTANT)
        cuts.append((whole[:at], text_of(whole[at:], field, "ends with a reply that ")))
    (one, better), (other, worse) = cuts
    if one != other:
        turns = (whole.count(HUMAN) for whole in (one, other))
        raise FieldError(
            rejected,
            f"differs from {chosen!r} before the last {ASSISTANT!r} ({' and '.join(map(str, turns))} turns); only the "
            "last reply may differ",
        )
    return one, better, worse


def is_transcript(value) -> bool:
    return isinstance(value, str) and ASSISTANT in value
