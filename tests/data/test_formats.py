"""Records: recognised by field names, and each refusal names file, line and field."""

import pytest

from rlhf_jax.data import formats
from rlhf_jax.errors import InputError
from tests.data.made_rows import refused, rows

VERTEX = {"input_text": "Say hi", "candidate_0": "zero", "candidate_1": "one", "choice": 0}
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


def test_vertex_choice_is_the_index_of_the_better():
    first, second = formats.pairs(rows(VERTEX, {**VERTEX, "choice": 1}))
    assert (first.prompt, first.chosen, first.rejected) == ("Say hi", "zero", "one")
    assert (second.chosen, second.rejected) == ("one", "zero")
    assert second.row.line == 2


@pytest.mark.parametrize("choice", [2, -1, True, False, 1.0, "1", None, [0]])
def test_choice_is_0_or_1_and_nothing_that_equals_it(choice):
    message = refused(formats.pairs, VERTEX, {**VERTEX, "choice": choice})
    shown = "null" if choice is None else repr(choice)
    assert message.startswith(
        f"p.jsonl, line 2: 'choice' is {shown}; expected 0 or 1, the index of the better candidate"
    )
    assert "the other lines of the file are not affected" in message


@pytest.mark.parametrize("field", ["input_text", "candidate_0", "candidate_1"])
@pytest.mark.parametrize(
    "value, reason", [(3, "is 3; expected a string"), ("", "is empty"), (" \n", "is empty")]
)
def test_text_fields(field, value, reason):
    message = refused(formats.pairs, {**VERTEX, field: value})
    assert message.startswith(f"p.jsonl, line 1: '{field}' {reason}")


def test_missing_field_is_named_whether_first_or_later():
    without = {name: value for name, value in VERTEX.items() if name != "choice"}
    for order, line in (((without, VERTEX), 1), ((VERTEX, without), 2)):
        assert f"p.jsonl, line {line}: 'choice' is missing" in refused(formats.pairs, *order)
    assert "'choice' is missing" in refused(formats.pairs, without)
    assert "'prompt' is missing" in refused(formats.pairs, {"chosen": "a", "rejected": "b"})


def test_unknown_fields_list_what_is_known():
    message = refused(formats.pairs, {"question": "a", "answer": "b"})
    assert "line 1: the fields are 'question', 'answer'" in message and "prompt, chosen, rejected" in message


def test_bad_records_within_the_fraction_are_left_out():
    bad = {**VERTEX, "choice": 2}
    records = formats.pairs(rows(VERTEX, bad, VERTEX, VERTEX), max_bad_records=0.25)
    assert [pair.row.line for pair in records] == [1, 3, 4]
    with pytest.raises(InputError, match="No record is left"):
        formats.pairs(rows(bad), max_bad_records=1.0)


def test_plain_pairs_and_soft_labels():
    plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
    hard, soft, whole = formats.pairs(rows(plain, {**plain, "soft_label": 0.7}, {**plain, "soft_label": 1}))
    assert (hard.chosen, hard.rejected, hard.soft_label, soft.soft_label, whole.soft_label) == (
        "b",
        "c",
        None,
        0.7,
        1,
    )
    for value in (1.2, -0.1, "0.5", True, float("nan")):
        assert "'soft_label' is" in refused(formats.pairs, {**plain, "soft_label": value})


def test_equal_candidates_are_kept_and_counted(caplog):
    with caplog.at_level("WARNING"):
        assert len(formats.pairs(rows(VERTEX, {**VERTEX, "candidate_1": "zero"}))) == 2
    assert "1 of 2 pairs have two equal candidates" in caplog.text


def test_each_source_has_its_own_format(caplog):
    mixed = rows(VERTEX) + rows({"prompt": "a", "chosen": "b", "rejected": "c"}, source="q.jsonl")
    with caplog.at_level("INFO"):
        assert [pair.chosen for pair in formats.pairs(mixed)] == ["zero", "b"]
    assert "p.jsonl: 1 rows of Vertex preferences" in caplog.text and "q.jsonl: 1 rows" in caplog.text


def test_prompts_and_examples():
    assert [p.text for p in formats.prompts(rows({"prompt": "a"}))] == ["a"]
    assert [p.text for p in formats.prompts(rows({"input_text": "a", "prompt": "b"}))] == ["a"]
    (example,) = formats.examples(rows({"input_text": "a", "output_text": " b"}))
    assert (example.prompt, example.completion) == ("a", " b")  # text is never stripped
    (example,) = formats.examples(
        rows({"prompt": CHAT, "completion": [{"role": "assistant", "content": "Hello"}]})
    )
    assert (example.prompt, example.completion) == (CHAT, "Hello")


def test_plain_texts():
    (example,) = formats.examples(rows({"text": " as it is\n", "title": "x"}), instruction="Sum up.")
    assert (example.prompt, example.completion) == ("", " as it is\n")  # an instruction belongs to a prompt
    (example,) = formats.examples(rows({"text": "x", "prompt": "a", "completion": "b"}))
    assert (example.prompt, example.completion) == ("a", "b")
    assert refused(formats.examples, {"text": "x"}, {"text": 3}).startswith(
        "p.jsonl, line 2: 'text' is 3; expected"
    )
    assert "prompt, completion; text" in refused(formats.examples, {"question": "a"})


@pytest.mark.parametrize(
    "prompt, reason",
    [
        ([], "is an empty list"),
        (["Hi"], "message 1 is 'Hi'; expected an object"),
        ([{"role": "user"}], "expected an object with 'role' and 'content'"),
        ([{"role": "wizard", "content": "x"}], "expected a 'role' among"),
        ([{"role": "user", "content": " "}], "expected text as 'content'"),
        ([{"role": ["user"], "content": "x"}], "expected a 'role' among"),
        ([*CHAT, {"role": "assistant", "content": "x"}], "ends with a message of the assistant"),
    ],
)
def test_messages(prompt, reason):
    message = refused(formats.prompts, {"prompt": prompt})
    assert message.startswith("p.jsonl, line 1: 'prompt' ") and reason in message


def test_instruction_as_in_vertex_prompts():
    (prompt,) = formats.prompts(rows({"input_text": "Post."}), instruction="Summarize in less than 50 words.")
    assert prompt.text == "Summarize in less than 50 words.\n\n\nPost."
    (pair,) = formats.pairs(rows(VERTEX), instruction="Be brief.")
    assert (pair.prompt, pair.chosen) == ("Be brief.\n\n\nSay hi", "zero")
    (prompt,) = formats.prompts(rows({"prompt": CHAT}), instruction="Be brief.")
    assert prompt.text == [CHAT[0], {"role": "user", "content": "Be brief.\n\n\nHi"}]
    assert CHAT[1]["content"] == "Hi"  # the rows are not touched
    assert formats.prompts(rows({"prompt": "a"}))[0].text == "a"


def test_a_message_shows_no_control_characters():
    message = refused(formats.pairs, {**VERTEX, "choice": "\x1b[2J\u202e"})
    assert "\x1b" not in message and "\u202e" not in message


def test_the_format_with_the_most_fields_counts():
    """A label beside prompt and completion is read: what was not accepted is nothing to imitate."""
    good = {"prompt": "a", "completion": "b"}
    labels = rows({**good, "label": False}, {**good, "completion": "c", "label": True})
    assert [one.completion for one in formats.examples(labels)] == ["c"]
    assert [one.completion for one in formats.examples(rows(good))] == ["b"]
    chosen = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert [one.completion for one in formats.examples(rows(chosen))] == ["b"]
    assert [one.text for one in formats.prompts(rows(chosen, chosen))] == ["a", "a"]


def test_a_format_that_hardly_fits_is_not_guessed():
    message = refused(formats.pairs, {"question": "a", "answer": "b"})
    assert "expected one of: input_text, candidate_0" in message and "question, answers" in message
    assert "'label' is missing; a line of labelled completions holds" in refused(
        formats.pairs, {"prompt": "a", "completion": "b"}
    )


def test_the_log_names_format_and_derivation(caplog):
    with caplog.at_level("INFO"):
        formats.labelled(rows(VERTEX, VERTEX))
    assert (
        "p.jsonl: 2 rows of Vertex preferences (input_text, candidate_0, candidate_1, choice)" in caplog.text
    )
    assert "2 pair records, 4 records derived from them" in caplog.text


def test_source_of_a_record():
    plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
    one, other, third = formats.pairs(
        rows(plain, {**plain, "source": "evol"}, {**plain, "dataset": "web", "source": 3})
    )
    assert [formats.source_of(pair) for pair in (one, other, third)] == ["p.jsonl", "evol", "web"]
    assert formats.source_of(formats.Pair("a", "b", "c")) == ""


def test_labels_are_kept_where_they_are_wanted():
    labels = rows({"prompt": "a", "completion": "b", "label": True})
    assert formats.pairs_or_labelled(labels) == formats.labelled(labels)
    assert formats.pairs_or_labelled(rows(VERTEX)) == formats.pairs(rows(VERTEX))
    mixed = formats.pairs_or_labelled(rows(VERTEX, source="q.jsonl") + labels, instruction="Go.")
    assert [one.accepted for one in mixed] == [True, False, True] and mixed[0].prompt.startswith("Go.")
