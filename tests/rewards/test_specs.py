"""Specs of rewards: what they mean, and what a wrong one is told."""

import sys

import pytest

from rlhf_jax.errors import InputError
from rlhf_jax.rewards import rules, specs


def score(text, *completions, **fields):
    return specs.parse(text).load()([""] * len(completions), list(completions), **fields)


def test_rules_and_parameters():
    assert specs.parse("sentiment").load() is rules.RULES["sentiment"]
    assert score("length:target=2", "a b") == [1]
    assert score("length:unit=characters,target=4,width=0.5", "abc") == [-1]
    assert score("exact_match:ignore_case=false,after=####", "#### A", "#### a", answer=["A", "A"]) == [1, 0]


def test_a_pattern_may_hold_what_separates():
    assert score("regex:pattern=^a{1,2},b:c=d$", "aa,b:c=d", "aaa,b:c=d") == [1, 0]
    assert score("regex:pattern=a[,]x=,match=full", "a,x=", "a,x=1") == [1, 0]
    assert score("regex:match=full,pattern= a,b ", " a,b ", "a,b") == [1, 0]


def test_what_can_hang_runs_elsewhere():
    where = {
        text: specs.parse(text).in_process for text in ("sentiment", "exact_match", "regex:pattern=a", "m:f")
    }
    assert where == {"sentiment": True, "exact_match": True, "regex:pattern=a": False, "m:f": False}


def test_a_function_by_import_path_is_imported_when_loaded(tmp_path, monkeypatch):
    (tmp_path / "mine_for_specs.py").write_text(
        "def f(completions): return [1.0 for _ in completions]\nx = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec = specs.parse("mine_for_specs:f")
    assert "mine_for_specs" not in sys.modules and spec.name == "f"
    assert spec.load()(completions=["a"]) == [1.0]
    for missing in ("g", "x"):
        with pytest.raises(TypeError, match=f"no function '{missing}'"):
            specs.parse(f"mine_for_specs:{missing}").load()


@pytest.mark.parametrize(
    "text, found",
    [
        ("sentimant", "did you mean 'sentiment'"),
        ("", "neither a rule, a model nor an import path"),
        ("a.b", "package.module:function"),
        ("a.b:", "neither"),
        ("a b:f", "neither"),
        ("../x:f", "neither"),
        ("a:f.g", "neither"),
        ("sentiment:", "Parameters of sentiment: none"),
        ("sentiment:x=1", "'x=1' is not NAME=VALUE"),
        ("length", "target is missing, as in 'length:target=...'"),
        ("length:", "'' is not NAME=VALUE"),
        ("length:50", "'50' is not NAME=VALUE"),
        ("length:target=50,units=words", "'units=words' is not .* Parameters of length: target, unit, width"),
        ("length:target=50,target=60", "target is given twice"),
        ("length:target=1e2", "expected a whole number"),
        ("length:target=2,width=nan", "width is 'nan'; expected a number"),
        ("length:target=2,width=inf", "width is 'inf'; expected a number"),
        ("length:target=0", "expected 1 or more"),
        ("exact_match:ignore_case=1", "expected true or false"),
        ("regex:pattern=(", "no regular expression"),
        ("regex:pattern=a,mach=full", "'mach=full' is not"),
    ],
)
def test_a_wrong_spec_is_named(text, found):
    with pytest.raises(InputError, match=found):
        specs.parse(text)
