"""Where a prompt ends: messages in three styles, and transcripts of HH-RLHF."""

import random

import pytest

from rlhf_jax.data import formats
from tests.data.made_rows import changed, refused, rows

ASKED = [{"role": "user", "content": "Hi"}]
HH = {
    "chosen": "\n\nHuman: Is 4 prime?\n\nAssistant: Why do you ask?\n\nHuman: Homework.\n\nAssistant: No: 2 * 2.",
    "rejected": "\n\nHuman: Is 4 prime?\n\nAssistant: Why do you ask?\n\nHuman: Homework.\n\nAssistant: Yes.\n\nIt is.",
}
SHAREGPT = {
    "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"},
                      {"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Bye"}],
    "chosen": {"from": "gpt", "value": "Farewell!"},
    "rejected": {"from": "gpt", "value": "Whatever."},
}  # fmt: skip
WHOLE = {
    "chosen": [*ASKED, {"role": "assistant", "content": "Hello!"}],
    "rejected": [*ASKED, {"role": "assistant", "content": "What?"}],
}
VERTEX_CHAT = {
    "context": "Be brief.",
    "messages": [{"author": "user", "content": "Hi"}, {"author": "assistant", "content": "Hello."},
                 {"author": "user", "content": "Bye"}],
    "candidate_0": "So long.", "candidate_1": "Ciao.", "choice": 1,
}  # fmt: skip


def test_hh_transcripts_differ_in_their_last_turn():
    (pair,) = formats.pairs(rows(HH))
    assert pair.prompt.endswith("\n\nHuman: Homework.\n\nAssistant:")
    assert (pair.chosen, pair.rejected) == (" No: 2 * 2.", " Yes.\n\nIt is.")
    assert [one.text for one in formats.prompts(rows(HH, HH))] == [pair.prompt]


@pytest.mark.parametrize("seed", range(20))
def test_a_split_transcript_is_the_transcript(seed):
    """Whatever the turns say, and however much the replies have in common, no character is lost or moved."""
    rng = random.Random(seed)
    say = lambda: (
        "".join(rng.choice(["a", " ", "\n", "\n\n", "Human:", "Assistant:", "é"]) for _ in range(9)) + "x"
    )
    turns = "".join(f"\n\nHuman: {say()}\n\nAssistant: {say()}" for _ in range(rng.randrange(3)))
    prompt, common = f"{turns}\n\nHuman: {say()}\n\nAssistant:", say().replace("\n\nAssistant:", "")
    replies = [(" " + common + say()).replace("\n\nAssistant:", "") for _ in range(2)]
    (pair,) = formats.pairs(rows(dict(chosen=prompt + replies[0], rejected=prompt + replies[1])))
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, *replies)


@pytest.mark.parametrize(
    "field, value, reason",
    [
        ("rejected", None, "'rejected' is null; expected a string"),
        ("rejected", HH["chosen"] + "\n\nHuman: Oh?\n\nAssistant: Yes.",
         "'rejected' differs from 'chosen' before the last '\\n\\nAssistant:' (2 and 3 turns)"),
        ("rejected", HH["rejected"].replace("Homework", "For fun"), "'rejected' differs from 'chosen' before the last"),
        ("chosen", "\n\nHuman: Is 4 prime?\n\nAssistant: ", "'chosen' ends with a reply that is empty"),
        ("chosen", "No.", "'chosen' is 'No.'; expected a transcript, '\\n\\nHuman:' ... "),
        ("rejected", "\n\nAssistant: Hi.", "expected a transcript"),
    ],
)  # fmt: skip
def test_transcripts_that_cannot_be_split(field, value, reason):
    message = refused(formats.pairs, HH, {**HH, field: value})
    assert message.startswith(f"p.jsonl, line 2: '{field}' ") and reason in message


def test_sharegpt_preferences():
    (pair,) = formats.pairs(rows(SHAREGPT))
    assert [message["role"] for message in pair.prompt] == ["system", "user", "assistant", "user"]
    assert (pair.prompt[-1]["content"], pair.chosen, pair.rejected) == ("Bye", "Farewell!", "Whatever.")
    listed = {**SHAREGPT, "chosen": [SHAREGPT["chosen"]]}
    assert formats.pairs(rows(listed))[0].chosen == "Farewell!"
    system = {**SHAREGPT, "conversations": SHAREGPT["conversations"][1:], "system": "Be kind."}
    assert formats.pairs(rows(system))[0].prompt == pair.prompt
    assert formats.prompts(rows(SHAREGPT))[0].text == pair.prompt


@pytest.mark.parametrize(
    "row, reason",
    [
        (changed(SHAREGPT, "chosen", "from", "human"), "'chosen' has 1 messages; expected one, of the assistant"),
        (changed(SHAREGPT, "chosen", {"from": "gpt"}),
         "'chosen' message 1 is {'from': 'gpt'}; expected an object with 'from' and 'value'"),
        (changed(SHAREGPT, "conversations", 1, "from", "tool"),
         "'conversations' message 2 is {'from': 'tool', 'value': 'Hi'}; expected a 'from' among system, human"),
        (changed(SHAREGPT, "conversations", SHAREGPT["conversations"][:3]), "ends with a message of the assistant"),
        (changed(SHAREGPT, "conversations", "Hi\n"[:0]), "'conversations' is empty; expected text"),
        ({**SHAREGPT, "system": 3}, "'system' is 3; expected a string"),
    ],
)  # fmt: skip
def test_malformed_sharegpt_preferences(row, reason):
    message = refused(formats.pairs, SHAREGPT, row)
    assert message.startswith("p.jsonl, line 2: ") and reason in message


def test_conversations_with_the_prompt_in_common():
    (pair,) = formats.pairs(rows(WHOLE))
    assert (pair.prompt, pair.chosen, pair.rejected) == (ASKED, "Hello!", "What?")
    # As ultrafeedback_binarized has them: the prompt once more, as text.
    (pair,) = formats.pairs(rows({"prompt": "Hi", **WHOLE}))
    assert (pair.prompt, pair.chosen) == (ASKED, "Hello!")
    (pair,) = formats.pairs(rows({"prompt": ASKED, **WHOLE}))
    assert (pair.prompt, pair.rejected) == (ASKED, "What?")
    # And without it in them: each is one message.
    (pair,) = formats.pairs(
        rows({"prompt": ASKED, "chosen": WHOLE["chosen"][1:], "rejected": WHOLE["rejected"][1:]})
    )
    assert (pair.prompt, pair.chosen, pair.rejected) == (ASKED, "Hello!", "What?")
    message = refused(formats.pairs, {"prompt": "Hey", **WHOLE})
    assert "'prompt' is 'Hey', which the conversation of 'chosen' does not have" in message


@pytest.mark.parametrize(
    "row, reason",
    [
        (
            changed(WHOLE, "rejected", 0, "content", "Ho"),
            "'rejected' differs from 'chosen' from message 1 on (2 and 2",
        ),
        (
            changed(WHOLE, "rejected", [*WHOLE["chosen"], *WHOLE["rejected"]]),
            "from message 3 on (2 and 4 messages)",
        ),
        (changed(WHOLE, "chosen", 1, "role", "user"), "'chosen' holds no whole conversation"),
        (changed(WHOLE, "rejected", WHOLE["rejected"][1:]), "'rejected' holds no whole conversation"),
        (changed(WHOLE, "chosen", "Hello"), "'chosen' holds no whole conversation"),
        (
            {name: [value[1], *value[1:]] for name, value in WHOLE.items()},
            "differs from 'chosen' from message 1 on",
        ),
    ],
)
def test_conversations_that_cannot_be_compared(row, reason):
    message = refused(formats.pairs, WHOLE, row)
    assert message.startswith("p.jsonl, line 2: ") and reason in message


def test_vertex_chat():
    (pair,) = formats.pairs(rows(VERTEX_CHAT))
    assert [message["role"] for message in pair.prompt] == ["system", "user", "assistant", "user"]
    assert (pair.prompt[0]["content"], pair.chosen) == ("Be brief.", "Ciao.")
    without = {**VERTEX_CHAT, "context": ""}
    assert formats.pairs(rows(without))[0].prompt == pair.prompt[1:]
    assert formats.prompts(rows({"messages": VERTEX_CHAT["messages"]}))[0].text == pair.prompt[1:]
    message = refused(formats.pairs, VERTEX_CHAT, changed(VERTEX_CHAT, "messages", 0, "author", "bot"))
    assert (
        "line 2: 'messages' message 1 is" in message and "expected a 'author' among system, user" in message
    )
    # `context` is Vertex's word: beside other messages it may be anything.
    row = {"messages": ASKED, "context": 7}
    assert formats.prompts(rows(row))[0].text == ASKED


def test_conversations_to_imitate_and_to_continue():
    whole = [*ASKED, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Bye"}]
    (example,) = formats.examples(rows({"messages": whole}))
    assert (example.prompt, example.completion) == (
        ASKED,
        "Hello!",
    )  # what follows the last reply asks for nothing
    assert formats.prompts(rows({"messages": whole}))[0].text == whole
    assert formats.prompts(rows({"messages": whole[:2]}))[0].text == ASKED
    assert "'messages' ends with a message of the user; expected" in refused(
        formats.examples, {"messages": ASKED}
    )
    reply = {"messages": whole[1:2]}
    assert "begins with its only message of the assistant" in refused(formats.examples, reply)
    assert "has no message of the user before the last reply" in refused(formats.prompts, reply)
    shared = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
    (example,) = formats.examples(rows(shared))
    assert (example.prompt, example.completion) == (ASKED, "Hello!")
