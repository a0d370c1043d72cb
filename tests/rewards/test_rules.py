"""The rules that ship, by hand."""

import re

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import rules


def test_sentiment_has_a_sign_and_reads_completions_alone():
    good, bad, flat = rules.RULES["sentiment"](["awful"] * 3, ["wonderful", "horrible", "table"])
    assert good > 0.3 and bad < -0.3 and flat == 0


def test_length_in_words_and_characters():
    texts = ["a b c d", "", "a b", "a b c d e f g h", "  a \n b  c d "]
    assert rules.length(4)([""] * 5, texts) == [1, 0, 0.5, 0, 1]
    assert rules.length(4, width=2.0)([""] * 5, texts) == [1, -1, 0, -1, 1]
    assert rules.length(2, "characters")(["", ""], ["שלום", "🙂🙂"]) == [0, 1]


@pytest.mark.parametrize(
    "arguments", [(0,), (-3,), (5, "tokens"), (5, "words", -1.0), (5, "words", float("nan"))]
)
def test_length_refuses(arguments):
    with pytest.raises(InputError, match="reward length"):
        rules.length(*arguments)


def test_regex_anywhere_and_full():
    texts = ["42", "is 42.", "4\n2", ""]
    assert rules.regex(r"\d+")([""] * 4, texts) == [1, 1, 1, 0]
    assert rules.regex(r"\d+", "full")([""] * 4, texts) == [1, 0, 0, 0]
    # fullmatch, not `$`, which would let a line end pass; a dot matches line ends where the pattern says so.
    assert rules.regex("4.2", "full")(["", ""], ["4x2\n", "4\n2"]) == [0, 0]
    assert rules.regex("(?s)4.2", "full")(["", ""], ["4x2\n", "4\n2"]) == [0, 1]


@pytest.mark.parametrize(
    "arguments, found", [(("(",), "no regular"), (("",), "empty"), (("a", "begin"), "match")]
)
def test_regex_refuses(arguments, found):
    with pytest.raises(InputError, match=found):
        rules.regex(*arguments)


def test_exact_match_normalises_what_it_is_told_to():
    texts, answers = ["  The\n Answer", "the answer", "answer", "7", "7.0"], ["the answer"] * 3 + [7, 7]
    prompts = [""] * 5
    assert rules.exact_match()(prompts, texts, answer=answers) == [1, 1, 0, 1, 0]
    assert rules.exact_match(ignore_case=False)(prompts, texts, answer=answers) == [0, 1, 0, 1, 0]
    assert rules.exact_match(ignore_space=False)(prompts, texts, answer=answers) == [0, 1, 0, 1, 0]


def test_exact_match_of_the_first_line():
    score = rules.exact_match(first_line=True)
    texts = ["7\nand more", "\n 7", "8\n7", "", "7 8"]
    assert score([""] * 5, texts, answer=[7] * 5) == [1, 1, 0, 0, 0]


def test_exact_match_after_a_mark():
    texts = ["6 * 7 #### 42", "#### 41 no #### 42", "42", "#### 42 or so"]
    score = rules.exact_match(after="####")
    assert score([""] * 4, texts, answer=["42"] * 4) == [1, 1, 0, 0]
    assert score([""] * 4, texts, answer=["six times seven #### 42"] * 4) == [1, 1, 0, 0]


@pytest.mark.parametrize("answer", [None, True, ["42"]])
def test_exact_match_names_an_answer_that_is_none(answer):
    with pytest.raises(TypeError, match=re.escape(f"answer is {answer!r}")):
        rules.exact_match()([""], ["42"], answer=[answer])


def test_math_compares_values_not_text():
    pytest.importorskip("math_verify")
    pairs = [
        ("so it is \\boxed{0.75}", "3/4", 1),
        ("$\\frac{6}{8}$", "0.75", 1),
        ("I get 1,234 in all", 1234, 1),
        ("I get 41", "42", 0),
        ("no idea", "42", 0),
        ("it is $2\\pi$", "2\\pi", 1),
        ("it is 2", "2\\pi", 0),  # read as prose, the answer would be 2
        ("so 10", "10^{10}", 0),
        ("$\\sqrt{2}$", "$\\sqrt{2}$", 1),
        ("x = 3", "\\boxed{x=3}", 1),
    ]
    completions, answers, expected = zip(*pairs, strict=True)
    assert rules.math()([""] * len(pairs), list(completions), answer=list(answers)) == list(expected)
    with pytest.raises(ValueError, match="cannot be read as mathematics"):
        rules.math()([""], ["42"], answer=[""])


def test_math_gives_up_on_a_completion_in_time():
    pytest.importorskip("math_verify")
    assert rules.math(sample_seconds=1)(["", ""], ["9**9**9**9", "42"], answer=["42", "42"]) == [0, 1]


def test_math_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("pip install 'rlhf_jax[math]'")):
        rules.math()
