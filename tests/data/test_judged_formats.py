"""Labels, ratings, rankings and comparisons of published data sets: a faithful row of each, and malformed ones."""

import pytest

from rlhf_jax.data import formats
from tests.data.made_rows import changed, refused, rows

ASKED = [{"role": "user", "content": "Hi"}]
KTO = {"messages": [*ASKED, {"role": "assistant", "content": "Hello."}], "label": True}
PLAIN = {"prompt": "Hi", "completion": "Hello.", "label": False}
HELPSTEER = {"prompt": "Hi", "response": "Hello.", "helpfulness": 3, "correctness": 4, "coherence": None,
             "complexity": 1, "verbosity": 0}  # fmt: skip
ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "Name a prime.",
    "models": ["a", "b", "c", "d"],
    "completions": [
        {"model": "a", "response": "Four.", "overall_score": 10.0, "annotations": {
            "helpfulness": {"Rating": "1", "Rationale": "Wrong."}, "honesty": {"Rating": "N/A", "Rationale": ""},
            "truthfulness": {"Rating": "1"}, "instruction_following": None}},
        {"model": "b", "response": "Seven.", "overall_score": 8.5, "annotations": {
            "helpfulness": {"Rating": "5"}, "honesty": {"Rating": "4"}, "truthfulness": {"Rating": "5"},
            "instruction_following": {"Rating": "5"}}},
        {"model": "c", "response": "Two, perhaps.", "overall_score": 7.0, "annotations": {
            "helpfulness": {"Rating": "4"}, "truthfulness": {"Rating": "5"}}},
        {"model": "d", "response": "Unjudged.", "overall_score": None, "annotations": {}},
    ],
}  # fmt: skip
COMPARISON = {
    "info": {"id": "t3", "post": "My cat sings.", "title": "Singing cat", "subreddit": "cats", "article": None},
    "summaries": [{"text": " Cat sings.", "policy": "sup1"}, {"text": "A cat.", "policy": "ref"}],
    "choice": 1, "worker": "w", "batch": "batch3", "split": "train", "extra": {"confidence": None},
}  # fmt: skip
AXES = {
    "info": {"article": "A cat sang.", "post": None, "title": "News", "subreddit": None},
    "summary": {"text": "Cat sang.", "axes": {"overall": 6, "accuracy": 7, "coverage": None}},
}


def test_labelled_completions():
    one, other = formats.labelled(rows(PLAIN, {**PLAIN, "label": True}))
    assert (one.prompt, one.completion, one.accepted, other.accepted) == ("Hi", "Hello.", False, True)
    assert formats.labelled(rows({**PLAIN, "label": "False"}, untyped=True))[0].accepted is False
    for value in (1, 0, "true", None):
        assert "line 2: 'label' is" in refused(formats.labelled, PLAIN, {**PLAIN, "label": value})


def test_labelled_conversations():
    (one,) = formats.labelled(rows(KTO))
    assert (one.prompt, one.completion, one.accepted) == (ASKED, "Hello.", True)
    shared = {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
        "label": False,
    }
    (other,) = formats.labelled(rows(shared))
    assert (other.prompt, other.completion, other.accepted) == (ASKED, "Hello.", False)
    longer = {**KTO, "messages": [*KTO["messages"], *ASKED]}  # of which message would the label be?
    assert "line 2: 'messages' ends with a message of the user" in refused(formats.labelled, KTO, longer)


def test_rated_responses():
    (one,) = formats.rated(rows(HELPSTEER))
    assert (one.prompt, one.completion) == ("Hi", "Hello.")
    assert one.ratings == {"helpfulness": 3.0, "correctness": 4.0, "complexity": 1.0, "verbosity": 0.0}
    (one,) = formats.rated(rows({"prompt": "a", "completion": "b", "id": 7, "score": 0.5}))
    assert one.ratings == {"score": 0.5}  # an id is a number, and no rating
    (one,) = formats.rated(rows({"prompt": "a", "response": "b", "ratings": {"wit": 2, "taste": None}}))
    assert one.ratings == {"wit": 2.0}
    (one,) = formats.rated(
        rows({"prompt": "a", "response": "b", "helpfulness": "-3.5", "score": ""}, untyped=True)
    )
    assert one.ratings == {"helpfulness": -3.5}
    assert formats.prompts(rows(HELPSTEER, HELPSTEER))[0].text == "Hi"
    assert (
        len(formats.prompts(rows(HELPSTEER, HELPSTEER))) == 1
    )  # else one prompt could be trained on and held out


@pytest.mark.parametrize(
    "row, reason",
    [
        ({**HELPSTEER, "helpfulness": "3"}, "'helpfulness' is '3'; expected a number, or null"),
        ({**HELPSTEER, "helpfulness": True}, "'helpfulness' is True; expected a number"),
        ({**HELPSTEER, "correctness": float("nan")}, "'correctness' is nan; expected a number"),
        (
            {"prompt": "Hi", "response": "Hello.", "score": None},
            "'score' has no rating, and neither has another of",
        ),
        (
            {"prompt": "Hi", "response": "Hello."},
            "'ratings' is missing, and so are columns with ratings: overall",
        ),
        ({"prompt": "Hi", "response": "Hello.", "ratings": 4}, "'ratings' is 4; expected an object such as"),
        (
            {"prompt": "Hi", "response": "Hello.", "ratings": {"wit": "x"}},
            "'ratings' 'wit' is 'x'; expected a number",
        ),
    ],
)
def test_malformed_ratings(row, reason):
    message = refused(formats.rated, HELPSTEER, row)
    assert message.startswith("p.jsonl, line 2: ") and reason in message


def test_ultrafeedback():
    records = formats.rated(rows(ULTRAFEEDBACK))
    assert [one.completion for one in records] == ["Four.", "Seven.", "Two, perhaps."]
    assert records[0].prompt == [{"role": "user", "content": "Name a prime."}]
    assert records[0].ratings == {"helpfulness": 1.0, "truthfulness": 1.0}
    assert records[1].ratings["honesty"] == 4.0 and len(records[1].ratings) == 4
    # By the aspects that all three have; the overall score would have put the wrong answer first.
    (ranking,) = formats.rankings(rows(ULTRAFEEDBACK))
    assert ranking.completions == ("Seven.", "Two, perhaps.", "Four.") and ranking.ratings == (5.0, 4.5, 1.0)
    pairs = formats.pairs(rows(ULTRAFEEDBACK))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("Seven.", "Two, perhaps."),
        ("Seven.", "Four."),
        ("Two, perhaps.", "Four."),
    ]
    assert formats.source_of(pairs[0]) == "evol_instruct"
    (ranking,) = formats.rankings(rows(ULTRAFEEDBACK), by="truthfulness")
    assert ranking.ratings == (5.0, 5.0, 1.0)
    assert [pair.rejected for pair in formats.pairs(rows(ULTRAFEEDBACK), by="truthfulness")] == [
        "Four.",
        "Four.",
    ]
    plain = [{"response": "a", "overall_score": "7"}, {"response": "b", "overall_score": 9.5}]
    assert [one.ratings for one in formats.rated(rows({"instruction": "Hi", "completions": plain}))] == [
        {"overall": 7.0},
        {"overall": 9.5},
    ]
    assert formats.prompts(rows(ULTRAFEEDBACK))[0].text == records[0].prompt


@pytest.mark.parametrize(
    "path, value, reason",
    [
        (("completions",), [], "'completions' is []; expected a list of completions"),
        (
            ("completions", 1),
            "Seven.",
            "'completions' completion 2 is 'Seven.'; expected an object with 'response'",
        ),
        (("completions", 1, "response"), "", "'completions' completion 2 'response' is empty"),
        (
            ("completions", 1, "annotations"),
            "5",
            "'completions' completion 2 'annotations' is '5'; expected an object",
        ),
        (
            ("completions", 1, "annotations", "honesty", "Rating"),
            "high",
            "completion 2 'honesty' is 'high'; expected",
        ),
        (("completions",), ULTRAFEEDBACK["completions"][3:], "'completions' has no rating in 'annotations'"),
        (("instruction",), None, "'instruction' is null"),
    ],
)
def test_malformed_ultrafeedback(path, value, reason):
    message = refused(formats.rated, ULTRAFEEDBACK, changed(ULTRAFEEDBACK, *path, value))
    assert message.startswith("p.jsonl, line 2: ") and reason in message


def test_summaries_compared_and_rated():
    (pair,) = formats.pairs(rows(COMPARISON))
    assert pair.prompt == "SUBREDDIT: r/cats\n\nTITLE: Singing cat\n\nPOST: My cat sings.\n\nTL;DR:"
    assert (pair.chosen, pair.rejected) == (
        " A cat.",
        " Cat sings.",
    )  # each a space after "TL;DR:", one alone
    assert [prompt.text for prompt in formats.prompts(rows(COMPARISON, COMPARISON))] == [pair.prompt]
    (one,) = formats.rated(rows(AXES))
    assert (one.prompt, one.completion) == ("Article:\nA cat sang.\n\nTL;DR:", " Cat sang.")
    assert one.ratings == {"overall": 6.0, "accuracy": 7.0}


@pytest.mark.parametrize(
    "reader, row, reason",
    [
        ("pairs", changed(COMPARISON, "choice", 2), "'choice' is 2; expected 0 or 1"),
        ("pairs", changed(COMPARISON, "summaries", COMPARISON["summaries"][:1]), "expected a list of two"),
        ("pairs", changed(COMPARISON, "summaries", 0, "text", ""), "'summaries' summary 0 'text' is empty"),
        ("pairs", changed(COMPARISON, "info", "title", None), "'info' 'title' is null; expected a string"),
        ("pairs", changed(COMPARISON, "info", "post", None), "'info' 'article' is null"),
        ("pairs", changed(COMPARISON, "info", "cats"), "'info' is 'cats'; expected an object"),
        (
            "rated",
            changed(AXES, "summary", "axes", {"overall": None}),
            "'summary' has no rating in its 'axes'",
        ),
        (
            "rated",
            changed(AXES, "summary", "axes", "overall", "6"),
            "'summary' 'overall' is '6'; expected a number",
        ),
        ("rated", changed(AXES, "summary", "axes", None), "'summary' 'axes' is null; expected an object"),
    ],
)
def test_malformed_summaries(reader, row, reason):
    good = COMPARISON if reader == "pairs" else AXES
    message = refused(getattr(formats, reader), good, row)
    assert message.startswith("p.jsonl, line 2: ") and reason in message


def test_ranked_completions():
    (one,) = formats.rankings(rows({"prompt": "Hi", "completions": ["best", "middle", "worst"]}))
    assert (one.completions, one.ratings) == (("best", "middle", "worst"), None)
    given = {"prompt": "Hi", "completions": ["b", "a", "c"], "ratings": [2, 3, 2]}
    (one,) = formats.rankings(rows(given))
    assert (one.completions, one.ratings) == (("a", "b", "c"), (3.0, 2.0, 2.0))
    assert [(pair.chosen, pair.rejected) for pair in formats.pairs(rows(given))] == [("a", "b"), ("a", "c")]
    for change, reason in (
        ({"completions": ["a"]}, "'completions' is ['a']; expected a list of two or more"),
        ({"completions": ["a", 3, "c"]}, "'completions' completion 2 is 3; expected a string"),
        ({"ratings": [1, 2]}, "'ratings' is [1, 2]; expected a list of 3 numbers"),
        ({"ratings": [1, None, 2]}, "'ratings' has null in place 2"),
    ):
        assert f"line 2: {reason}" in refused(formats.rankings, given, {**given, **change})
