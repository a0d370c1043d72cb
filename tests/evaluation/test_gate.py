"""The gate's judgement and its page: each fault is found, named in one sentence, and shown without harm."""

import json

import pytest

from rlhf_jax.evaluation import gate, gate_page, load_run
from rlhf_jax.evaluation.monitors import warning_signs
from rlhf_jax.evaluation.report import write_report
from tests.evaluation.made_gates import CASES, thresholds
from tests.evaluation.made_up import ATTACK, fill

MADE = {}


def judged(name):
    if name not in MADE:
        measures = CASES[name][0]()
        MADE[name] = gate.judge(measures, thresholds()) | {"measures": measures}
    return MADE[name]


@pytest.mark.parametrize("name", CASES)
def test_each_fault_is_named_in_one_sentence(name):
    found, (_, verdict, said) = judged(name), CASES[name]
    assert (found["verdict"], said in found["reason"]) == (verdict, True), found["reason"]
    assert found["reason"].count(". ") == 0 and "\n" not in found["reason"]
    order = [one["verdict"] for one in found["findings"]]
    assert order == sorted(order, key=("refuse", "warn", "pass").index) and order[0] == verdict
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_threshold_decides():
    measures = judged("memorised")["measures"]
    off = dict(refuse_accuracy_gap=1.0, refuse_loss_gap=99.0, warn_accuracy_gap=1.0, warn_loss_gap=99.0)
    found = gate.judge(measures, thresholds(**off, refuse_ece=1.0, warn_ece=1.0, min_accuracy=0.0))
    assert found["verdict"] == "warn" and all("by heart" not in one["sentence"] for one in found["findings"])
    few = gate.judge(measures, thresholds(min_pairs=10_000))
    assert few["verdict"] == "warn"  # with too few pairs nothing is refused


@pytest.mark.parametrize("name", ["healthy", "nothing held out", "a source"])
def test_the_page_is_whole_and_harmless(tmp_path, name):
    found = json.loads(json.dumps(judged(name) | {"about": {"data": ATTACK}}))
    for row in found["measures"]["by_source"]:
        row["source"] = ATTACK
    text = open(gate_page.write(str(tmp_path / "gate.html"), found, ATTACK)).read()
    assert gate_page.HEADLINES[found["verdict"]][1] in text and "<script>alert" not in text
    assert "<img" not in text and "http://" not in text and "https://" not in text
    shown = {"healthy": 5, "nothing held out": 0, "a source": 3}[name]
    assert text.count("<figure>") == shown
    assert ("Source by source" in text) == (name == "a source")


def test_damage_takes_away_parts_and_never_the_page():
    found = json.loads(json.dumps(judged("healthy")))

    def spoil(node, junk):
        for key in list(node):
            before, node[key] = node[key], junk
            gate_page.section(found)
            node[key] = before
            if isinstance(before, dict):
                spoil(before, junk)

    drawn, gate_page.figures = gate_page.figures, lambda m: []  # the figures' own turn is below
    try:
        for junk in (None, "x", [1, None], {"a": 1}, float("nan")):
            spoil(found, junk)
    finally:
        gate_page.figures = drawn
    parts = ("calibration", "by_length", "points", "preview", "longer_wins", "scale")
    for junk in (None, "x", [1, None], {"chosen": "x", "n": [1, 2], "proxy": 3}):
        assert gate_page.figures(found["measures"] | dict.fromkeys(parts, junk)) == []
    assert gate_page.section({}) == "" and gate_page.section({"verdict": "?"}) == ""


def test_the_report_has_it_before_the_policy(tmp_path):
    fill(tmp_path)
    (tmp_path / "gate.json").write_text(json.dumps(judged("memorised")))
    text = open(write_report(str(tmp_path))).read()
    assert text.index(gate_page.TITLE) < text.index("Training the policy")
    sign = next(one for one in warning_signs(str(tmp_path)) if one.name == "Gate before RL")
    assert sign.verdict == "bad" and "by heart" in sign.sentence
    # One judge of the reward model: the figures of its training log, taken while it moved, are other ones.
    assert not any(one.name.startswith("Reward model") for one in warning_signs(str(tmp_path)))
    (tmp_path / "gate.json").write_text("[1")
    run = load_run(str(tmp_path))
    assert run.gate == {} and "gate.json" in run.problems[0]
