"""Rewards computed from text alone: score(prompts, completions, **fields) -> list of floats, one a completion.

Every argument is a list with one entry a completion; a field is a column of the prompts' own records. What takes
parameters is made by a factory, which checks them. Knows no model and no tokens; imports nothing heavy."""

import functools
import importlib.util
import math as maths
import re

from rlhf_jax.errors import InputError

UNITS = ("words", "characters")
MATCHES = ("anywhere", "full")


@functools.cache
def _vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(prompts: list[str], completions: list[str]) -> list[float]:
    """VADER's compound sentiment of each completion alone, -1 (worst) to 1 (best); 0 where no word is charged.

    Hutto & Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
    """
    return [_vader().polarity_scores(completion)["compound"] for completion in completions]


def length(target: int, unit: str = "words", width: float = 0.0):
    """1 at `target`, 1 less for each `width` away from it on either side, without a floor (a mixture can clip).

    Args:
      target: in `unit`: words (what white space separates) or characters (code points). 1 or more.
      width: in `unit`; 0 takes the target, so that nothing and twice the target both get 0.
    Raises: InputError for a value out of range.
    """
    _check("length", "unit", unit, UNITS)
    if target < 1:
        raise InputError(f"reward length: target is {target}; expected 1 or more {unit}.")
    if not 0 <= width < maths.inf:
        raise InputError(f"reward length: width is {width}; expected 0 (as the target) or more {unit}.")
    scale = width or target

    def score(prompts: list[str], completions: list[str]) -> list[float]:
        sizes = (len(text.split() if unit == "words" else text) for text in completions)
        return [1.0 - abs(size - target) / scale for size in sizes]

    return score


def regex(pattern: str, match: str = "anywhere"):
    """1 where Python's `pattern` is found in the completion, or matches the whole of it (match="full"); else 0.

    Flags go into the pattern: (?s) lets a dot match a line end, (?i) ignores case. A pattern can take for ever
    ("catastrophic backtracking"), so call this with a time limit.
    Raises: InputError for an empty pattern or one that is no regular expression.
    """
    _check("regex", "match", match, MATCHES)
    if not pattern:
        raise InputError("reward regex: pattern is empty, which every completion matches. Give one.")
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(
            f"reward regex: {pattern!r} is no regular expression: {error}. Correct it."
        ) from None
    matched = compiled.fullmatch if match == "full" else compiled.search

    def score(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(matched(text) is not None) for text in completions]

    return score


def exact_match(
    ignore_case: bool = True, ignore_space: bool = True, after: str = "", first_line: bool = False
):
    """1 where the completion is the record's `answer`, else 0.

    Args:
      ignore_case: compares case-folded text.
      ignore_space: runs of white space count as one space, and as nothing at either end.
      after: if given, only what follows its last occurrence is compared ("####", say), in completion and answer
        alike; a completion without it gets 0, an answer without it counts as a whole.
      first_line: of the completion, only its first line with anything in it is compared.
    """

    def normal(text):
        text = " ".join(text.split()) if ignore_space else text
        return text.casefold() if ignore_case else text

    def score(prompts: list[str], completions: list[str], answer: list) -> list[float]:
        return [one(text, _answer_text(right)) for text, right in zip(completions, answer, strict=True)]

    def one(text, right):
        if first_line:
            text = next(iter(text.strip().splitlines()), "")
        if not after:
            return float(normal(text) == normal(right))
        _, found, text = text.rpartition(after)
        return float(bool(found) and normal(text) == normal(right.rpartition(after)[2]))

    return score


def math(sample_seconds: int = 2):
    """1 where math-verify finds an expression in the completion that equals the record's `answer`, else 0.

    `answer` is the answer alone, as plain text or LaTeX, with or without dollars or \\boxed: 42, 3/4, \\frac{3}{4}.
    Args:
      sample_seconds: math-verify's own limit on reading and on comparing one completion; one that needs longer gets
        0. It relies on SIGALRM, so it holds in the main thread of a worker alone, and not while C code runs.
    Raises: InputError if math-verify is missing; the score raises ValueError for an answer that is no mathematics.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise InputError(
            "reward math needs the package math-verify, which is missing. Run: pip install 'rlhf_jax[math]'"
        )
    if sample_seconds < 1:
        raise InputError(f"reward math: sample_seconds is {sample_seconds}; expected 1 or more.")

    def score(prompts: list[str], completions: list[str], answer: list) -> list[float]:
        import logging

        from math_verify import parse, verify

        logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it prints each text it gives up on
        read = functools.partial(parse, parsing_timeout=sample_seconds)
        scores = []
        for text, right in zip(completions, answer, strict=True):
            right = _answer_text(right)
            # Without dollars the library looks for numbers in prose: it reads 10^{10} as 10 and \sqrt{2} not at all.
            gold = read(right if "$" in right or "\\boxed" in right else f"${right}$")
            if not gold:
                raise ValueError(f"answer {right!r} cannot be read as mathematics")
            scores.append(float(verify(gold, read(text), timeout_seconds=sample_seconds)))
        return scores

    return score


def _answer_text(answer) -> str:
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise TypeError(f"answer is {answer!r}; expected text or a number")
    return str(answer)


def _check(rule, name, value, allowed):
    if value not in allowed:
        raise InputError(f"reward {rule}: {name} is {value!r}; expected {' or '.join(allowed)}.")


RULES = {"sentiment": sentiment}  # those that need no parameter and no field: what may judge a run as gold
DESCRIPTIONS = {"sentiment": "sentiment (VADER compound, -1 to 1)"}
