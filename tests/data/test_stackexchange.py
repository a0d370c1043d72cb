"""StackExchange: the published score, and pairs of answers to one question."""

import pytest

from rlhf_jax.data import formats, stackexchange
from tests.data.made_rows import changed, refused, rows

ROW = {
    "qid": 5, "question": "Why?", "date": "2010/01/01",
    "answers": [
        {"answer_id": 1, "pm_score": 2, "selected": False, "text": "Because."},
        {"answer_id": 2, "pm_score": 4, "selected": True, "text": "So that."},
        {"answer_id": 3, "pm_score": 2, "selected": False, "text": "<p>Hm.</p>"},
        {"answer_id": 4, "pm_score": -1, "selected": False, "text": "No."},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "upvotes, accepted, score",
    # log2(1 + upvotes): 0, 1, 1.58, 2, 2.32, 2.58 (5), 3.46 (10), 3.58 (11), 6.66, 9.97
    [(0, False, 0), (1, False, 1), (2, False, 2), (3, False, 2), (4, False, 2), (5, False, 3), (10, False, 3),
     (11, False, 4), (100, False, 7), (1000, False, 10), (0, True, 1), (5, True, 4), (-1, False, -1),
     (-50, False, -1), (-1, True, -1)],
)  # fmt: skip
def test_scores_by_hand(upvotes, accepted, score):
    assert stackexchange.score(upvotes, accepted) == score


def test_answers_are_rated_and_paired_by_score():
    records = formats.rated(rows(ROW))
    assert [one.ratings for one in records] == [{"score": s} for s in (2.0, 4.0, 2.0, -1.0)]
    assert (records[0].prompt, records[2].completion) == ("Question: Why?\n\nAnswer:", " <p>Hm.</p>")
    found = [(pair.chosen, pair.rejected) for pair in formats.pairs(rows(ROW))]
    assert found == [
        (" So that.", " Because."),
        (" So that.", " <p>Hm.</p>"),
        (" So that.", " No."),
        (" Because.", " No."),
        (" <p>Hm.</p>", " No."),
    ]  # never the two with 2
    best = formats.pairs(rows(ROW), which="best")
    assert [(pair.chosen, pair.rejected) for pair in best] == found[:3]
    (ranking,) = formats.rankings(rows(ROW))
    assert ranking.ratings == (4.0, 2.0, 2.0, -1.0)
    assert formats.prompts(rows(ROW))[0].text == records[0].prompt


def test_votes_become_scores():
    answers = [{"text": "a", "upvotes": 5, "selected": True}, {"text": "b", "upvotes": -2}]
    assert [one.ratings["score"] for one in formats.rated(rows({"question": "?", "answers": answers}))] == [
        4.0,
        -1.0,
    ]


def test_questions_without_a_better_answer_give_no_pair():
    tied = {**ROW, "answers": [ROW["answers"][0], ROW["answers"][2]]}
    single = {**ROW, "question": "Who?", "answers": ROW["answers"][:1]}
    assert len(formats.pairs(rows(ROW, {**tied, "question": "When?"}, single))) == 5
    message = refused(formats.pairs, tied)
    assert "No record is left" in message and "2 rated records, 0 records derived from them" in message


def test_pairs_of_published_pairs():
    row = {"question": "Why?", "response_j": "Because.", "response_k": "No."}
    (pair,) = formats.pairs(rows(row))
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Question: Why?\n\nAnswer:", " Because.", " No.")
    assert "line 2: 'response_k' is empty" in refused(formats.pairs, row, {**row, "response_k": ""})


@pytest.mark.parametrize(
    "path, value, reason",
    [
        (("answers",), None, "'answers' is null; expected a list of answers"),
        (
            ("answers", 1),
            {"text": "b"},
            "'answers' answer 2 is {'text': 'b'}; expected an object with 'text' and",
        ),
        (("answers", 1, "text"), 7, "'answers' answer 2 'text' is 7; expected a string"),
        (("answers", 1, "pm_score"), "4", "'answers' answer 2 'pm_score' is '4'; expected a number"),
        (("answers", 1, "pm_score"), 1.5, "'answers' answer 2 'pm_score' is 1.5; expected a whole number"),
        (
            ("answers", 1),
            {"text": "b", "upvotes": 3, "selected": "yes"},
            "answer 2 'selected' is 'yes'; expected true",
        ),
        (("question",), " ", "'question' is empty"),
    ],
)
def test_malformed_answers(path, value, reason):
    message = refused(formats.pairs, ROW, changed(ROW, *path, value))
    assert message.startswith("p.jsonl, line 2: ") and reason in message
