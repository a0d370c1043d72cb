"""The warning signs, each on a run made to show it."""

import json
import re

import numpy as np
import pytest

from rlhf_jax.evaluation import monitors
from tests.evaluation.made_up import (
    answers,
    evaluation,
    fill,
    good_rl,
    metric_rows,
    noise,
    rising,
    varied,
    write_lines,
)


def signs(path, **options):
    """{name without its stage: verdict}"""
    return {
        finding.name.split(" (ppo")[0]: finding.verdict for finding in monitors.warning_signs(path, **options)
    }


def test_a_good_run_raises_nothing(tmp_path):
    fill(tmp_path)
    found = signs(tmp_path)
    assert set(found.values()) == {"ok"}
    assert len(found) == 10


def with_rl(tmp_path, **series):
    """A good run of RL but for the series given."""
    rows = good_rl()
    for name, values in series.items():
        for row, value in zip(rows, np.broadcast_to(values, len(rows)).tolist(), strict=True):
            row[name] = value
    write_lines(tmp_path / "metrics.jsonl", rows)
    return tmp_path


def test_gold_that_peaks_and_falls_is_a_warning_and_below_the_start_is_bad(tmp_path):
    up_and_down = np.concatenate([np.linspace(0.1, 0.7, 30), np.linspace(0.7, 0.4, 30)]) + 0.03 * noise(60)
    assert signs(with_rl(tmp_path, gold_reward=up_and_down))["Learned against true reward"] == "warn"
    [finding] = [f for f in monitors.warning_signs(tmp_path) if f.name.startswith("Learned against")]
    assert re.search(r"near step (2[6-9]|3\d)\b", finding.sentence)
    down = np.linspace(0.1, -0.5, 60) + 0.03 * noise(60)
    assert signs(with_rl(tmp_path, gold_reward=down))["Learned against true reward"] == "bad"


def test_noise_around_a_level_gold_is_no_peak(tmp_path):
    for seed in range(20):
        level = rising(60, 0.1, 0.6) + 0.1 * noise(60, seed)
        assert signs(with_rl(tmp_path, gold_reward=level))["Learned against true reward"] == "ok"


def test_reward_that_never_moves(tmp_path):
    # Shaped like a published run whose reward model had memorised its pairs: reward 19.1 +- 0.4 throughout,
    # KL 0.1.
    flat = with_rl(tmp_path, reward=19.1 + 0.4 * noise(60, 8), kl=np.linspace(0.03, 0.13, 60))
    assert signs(flat)["Reward moves"] == "bad"
    assert signs(with_rl(tmp_path, reward=19.0))["Reward moves"] == "bad"
    assert (
        signs(with_rl(tmp_path, reward=np.linspace(0, 0.05, 60)))["Reward moves"] == "warn"
    )  # real, but tiny
    assert signs(with_rl(tmp_path, reward=rising(60, 1, -1)))["Reward moves"] == "bad"


def test_plateau_with_growing_kl(tmp_path):
    reward = np.minimum(np.arange(60) / 15, 1.0) * 20 - 1 + 0.2 * noise(60)
    wasteful = with_rl(tmp_path, reward=reward, kl=np.linspace(0, 60, 60))
    assert signs(wasteful)["Plateau"] == "warn"
    assert "Plateau" not in signs(with_rl(tmp_path, reward=reward, kl=rising(60, 0, 6)))


@pytest.mark.parametrize(("kl", "verdict"), [(6.0, "ok"), (14.0, "warn"), (25.0, "bad"), (-2.0, "bad")])
def test_kl_budget(tmp_path, kl, verdict):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(kl=kl)))
    assert signs(tmp_path)["Distance from the start (KL)"] == verdict
    if kl == 14.0:
        assert signs(tmp_path, kl_limit=20.0)["Distance from the start (KL)"] == "ok"


def test_kl_of_training_where_nothing_was_evaluated(tmp_path):
    assert signs(with_rl(tmp_path, kl=np.linspace(0, 30, 60)))["Distance from the start (KL)"] == "bad"


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.2, "ok"), (1.7, "warn"), (0.6, "warn"), (3.0, "bad"), (0.2, "bad")]
)
def test_length_drift(tmp_path, ratio, verdict):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(length_ratio=ratio)))
    assert signs(tmp_path)["Length drift"] == verdict


@pytest.mark.parametrize(("gain", "verdict"), [(0.5, "ok"), (0.0, "warn"), (-0.4, "bad")])
def test_gold_on_held_out_prompts(tmp_path, gain, verdict):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(gold_gain=gain)))
    assert signs(tmp_path)["Held-out prompts"] == verdict


def test_distinct_pairs_by_hand():
    assert monitors.distinct_2(["a b a b"]) == pytest.approx(2 / 3)  # ab, ba, ab
    assert monitors.distinct_2(["a b", "A b c!"]) == pytest.approx(3 / 4)  # ab, ab, bc, c!
    assert monitors.distinct_2(["a b a b"], budget=2) == 1.0
    assert monitors.distinct_2(["", "one"]) is None


def test_repetition_and_identical_completions(tmp_path):
    write_lines(tmp_path / "eval_results_untuned.jsonl", answers(varied(seed=1)))
    for texts, repetition, identical in (
        (varied(seed=2), "ok", "ok"),
        ([f"great great great great {i}" for i in range(24)], "bad", "ok"),
        (["what a lovely day this is"] * 24, "bad", "bad"),
        ([""] * 6 + varied(18, seed=3), "ok", "warn"),
    ):
        write_lines(tmp_path / "eval_results_tuned.jsonl", answers(texts))
        found = signs(tmp_path)
        assert (found["Repetition"], found["Identical completions"]) == (repetition, identical)


def test_entropy_collapse(tmp_path):
    assert signs(with_rl(tmp_path, entropy=rising(60, 3.0, 0.6)))["Entropy"] == "warn"
    assert signs(with_rl(tmp_path, entropy=rising(60, 3.0, 0.05)))["Entropy"] == "bad"


def test_memorised_reward_model(tmp_path):
    rows = metric_rows("reward_model", 40, loss=rising(40, 0.63, 0.003), accuracy=rising(40, 0.5, 1.0))
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert signs(tmp_path) == {"Reward model memorised": "warn"}  # from the loss, where nothing was held out
    for accuracy, memorised, quality in ((0.78, "warn", "ok"), (0.66, "bad", "ok"), (0.52, "bad", "bad")):
        (tmp_path / "reward_model.json").write_text(json.dumps({"accuracy": accuracy, "held_out_pairs": 400}))
        assert signs(tmp_path) == {"Reward model memorised": memorised, "Reward model accuracy": quality}


def test_nan_in_the_log_is_a_warning(tmp_path):
    rows = good_rl()
    rows[5].update(loss=None, nonfinite=["loss"])
    write_lines(tmp_path / "metrics.jsonl", rows)
    first = monitors.warning_signs(tmp_path)[0]
    assert (first.name, first.verdict) == ("Not a number", "warn")
    assert "ppo/loss (1 times)" in first.sentence
