"""A sweep judged from hand-made runs: intervals, the value at equal KL, and what is missing or failed."""

import json

import numpy as np
import pytest

from rlhf_jax.evaluation import sweep
from tests.evaluation.made_up import ATTACK, metric_rows, write_lines

KL = (0.0, 1.0, 3.0, 2.0, 4.0)


def made(directory, point, seed, *, scale=1.0, gain=1.0, curve=True):
    """A finished run: KL times `scale`, and at each step a reward of twice its KL and a gold reward of `gain` times."""
    workdir = directory / point / f"seed{seed}"
    kl = scale * np.array(KL)
    rows = metric_rows(count=5, kl=kl, reward=2 * kl, gold_reward=gain * kl, completion_length=10.0)
    write_lines(workdir / "metrics.jsonl", rows if curve else metric_rows("dpo", 5, loss=1.0))
    summary = {"untuned/reward": 0.25, "tuned/reward": 1.25 + seed, "tuned/kl": 2.0,
               "untuned/gold_reward": -0.5, "tuned/gold_reward": 0.5}  # fmt: skip
    (workdir / "evaluation.json").write_text(json.dumps({"summary": summary}))
    return sweep.Result(point, seed, str(workdir), 0)


def point(judged, name):
    return next(point for point in judged["points"] if point["name"] == name)


def test_the_interval_is_students():
    # Mean 2, deviation sqrt(2): 12.7062 * sqrt(2) / sqrt(2). Of 1, 2, 3 the deviation is 1: 4.30265 / sqrt(3).
    assert sweep.interval([1.0, 3.0]) == {"mean": 2.0, "half_width": pytest.approx(12.7062), "count": 2}
    assert sweep.interval([1.0, 2.0, 3.0])["half_width"] == pytest.approx(2.48414, abs=1e-4)
    assert sweep.interval([5.0]) == {"mean": 5.0, "half_width": None, "count": 1}
    assert sweep.interval([]) is None and sweep.interval([None, float("nan")]) is None


@pytest.mark.parametrize("freedom", [1, 2, 5, 9, 10, 11, 20, 100, 1000])
def test_quantiles_are_those_of_the_distribution(freedom):
    stats = pytest.importorskip("scipy.stats")
    assert sweep.t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-4)


def test_the_value_at_a_kl_is_where_the_curve_first_reaches_it():
    values = [0.0, 10.0, 20.0, 30.0, 40.0]
    assert sweep.at_kl(KL, values, 1.5) == 12.5  # a quarter of the way from 1 to 3
    assert sweep.at_kl(KL, values, 2.0) == 15.0  # not 30, where it is again
    assert sweep.at_kl(KL, values, 3.5) == 37.5  # from 2 to 4
    assert sweep.at_kl(KL, values, 0.0) == 0.0 and sweep.at_kl(KL, values, 4.5) is None


def test_points_are_compared_at_the_least_of_the_largest_kl(tmp_path):
    judged = sweep.judge([
        made(tmp_path, "near", 0, scale=0.5, gain=3.0), made(tmp_path, "near", 1, scale=1.0, gain=3.0),
        made(tmp_path, "far", 0, scale=2.0, gain=0.5), made(tmp_path, "far", 1, scale=2.0, gain=0.5),
    ])  # fmt: skip
    assert judged["equal_kl"] == 2.0  # half of 4
    near, far = point(judged, "near"), point(judged, "far")
    assert near["gold_reward_at_kl"] == {"mean": 6.0, "half_width": 0.0, "count": 2}
    assert far["gold_reward_at_kl"]["mean"] == 1.0 and far["reward_at_kl"]["mean"] == 4.0
    assert (
        near["reward"]["mean"] == 1.75 and near["reward_change"]["mean"] == 1.5
    )  # seeds: 1.25, 2.25 from 0.25
    assert near["gold_reward_change"] == {"mean": 1.0, "half_width": 0.0, "count": 2}
    heads, rows = sweep.table(judged)
    assert heads == ["point", "seeds", "KL", "reward", "change", "gold", "change",
                     "reward at KL 2", "gold at KL 2"]  # fmt: skip
    # Deviation of 1.25 and 2.25: sqrt(0.5), so 12.7062 / 2.
    assert rows[0][:5] == ["near", "2", "2.00 ± 0.00", "1.75 ± 6.35", "+1.50 ± 6.35"]


def test_failed_and_unfinished_runs_are_named_and_not_counted(tmp_path):
    judged = sweep.judge([
        made(tmp_path, "good", 0),
        sweep.Result("good", 1, str(tmp_path / "gone"), None),
        sweep.Result("bad", 0, str(tmp_path / "bad"), 137, f"killed | {ATTACK}"),
    ])  # fmt: skip
    _, rows = sweep.table(judged)
    assert [row[:2] for row in rows] == [["good", "1 of 2"], ["bad", "0 of 1"]]
    assert rows[0][3] == "1.25" and set(rows[1][2:]) == {"-"}
    assert judged["equal_kl"] is None  # one point alone has nothing to be compared with
    notes = " ".join(judged["notes"])
    assert "good, seed 1: not finished" in notes and "bad, seed 0: failed with status 137. killed" in notes
    sweep.write(str(tmp_path), judged, "Sweep", {"command": "typed"})
    html, text = (tmp_path / "sweep.html").read_text("utf-8"), (tmp_path / "sweep.md").read_text("utf-8")
    assert "<script>alert" not in html and "<img" not in html and "<svg" in html
    assert "| good | 1 of 2 |" in text and "killed \\|" in text
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert saved["command"] == "typed" and saved["points"][0]["reward"]["mean"] == 1.25


def test_what_has_no_kl_takes_no_part_in_the_comparison(tmp_path):
    judged = sweep.judge([
        made(tmp_path, "one", 0), made(tmp_path, "two", 0, scale=0.5),
        made(tmp_path, "dpo", 0, curve=False),
    ])  # fmt: skip
    assert judged["equal_kl"] == 2.0
    named = [name for name in ("one", "two", "dpo") if "gold_reward_at_kl" in point(judged, name)]
    assert named == ["one", "two"]
    notes = " ".join(judged["notes"])
    assert "Without a curve over KL: dpo" in notes
    assert point(judged, "dpo")["kl"]["mean"] == 2.0


def test_a_sweep_of_which_nothing_is_done_still_has_its_files(tmp_path):
    judged = sweep.judge([sweep.Result("a", 0, str(tmp_path / "a"), None)])
    sweep.write(str(tmp_path), judged, "Sweep", {})
    assert not (tmp_path / "sweep.png").exists() and "not finished" in (tmp_path / "sweep.html").read_text()
