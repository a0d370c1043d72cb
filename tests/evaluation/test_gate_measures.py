"""What the gate measures, on arrays whose answer is known."""

import numpy as np
import pytest
from scipy import stats

from rlhf_jax.evaluation import gate, gate_measures, label_noise
from rlhf_jax.evaluation.gate_measures import Pairs, Samples, measure
from tests.evaluation.made_gates import (
    flat,
    healthy,
    labelled,
    length_only,
    margins,
    prompts,
    samples,
    thresholds,
)


def test_calibrated_scores_have_no_error_but_chance():
    found = measure(labelled(margins(4000)))
    assert found["ece"] < 0.025 and abs(found["ece"] - found["ece_by_chance"]) < 0.012
    p = 1 / (1 + np.exp(-np.abs(margins(4000))))
    assert found["accuracy"]["value"] == pytest.approx(p.mean(), abs=0.02)
    assert found["accuracy"]["low"] < p.mean() < found["accuracy"]["high"]
    assert found["saturation"]["wrong_when_sure"] < 0.03
    # Five times as sure of the same: confidence is near 1, accuracy is not.
    sure = measure(labelled(5 * margins(4000), a=0.2))
    assert sure["ece"] - sure["ece_by_chance"] > 0.1


def test_calibration_error_by_hand():
    # Two bins: 0.52 (both right: 0.48 away) and 0.99 (one of two right: 0.49 away), two pairs each.
    confidence, right = [0.52, 0.52, 0.99, 0.99], [1, 1, 1, 0]
    assert gate_measures.ece(confidence, right) == pytest.approx(0.5 * 0.48 + 0.5 * 0.49)
    assert gate_measures.ece([1.0, 0.5], [1, 0.5]) == 0.0  # both ends have a bin


def test_loss_accuracy_and_saturation_by_hand():
    odds = np.log(0.99 / 0.01)
    scores = [[odds + 0.1, 0], [1, 0], [0, 0], [0, odds + 0.1]]
    found = measure(
        Pairs(scores, np.ones((4, 2)), prompts(4)), Pairs([[9, 0]] * 2, np.ones((2, 2)), ["a", "b"])
    )
    assert found["accuracy"]["value"] == 0.5  # the tie is wrong
    expected = np.mean([np.log1p(np.exp(-m)) for m in (odds + 0.1, 1, 0, -odds - 0.1)])
    assert found["loss"]["value"] == pytest.approx(expected)
    assert found["saturation"] == {"held_out": 0.5, "train": 1.0, "wrong_when_sure": 0.5}
    assert found["accuracy_gap"]["value"] == 0.5
    assert found["loss_gap"]["value"] == pytest.approx(expected - np.log1p(np.exp(-9)))


def test_the_bootstrap_is_that_of_whole_prompts():
    values, groups = np.array([1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1.0]), np.arange(12)
    draw = lambda *arrays: gate_measures.resampled(*arrays, 20000, np.random.default_rng(0))
    dist = draw(values, groups)
    binomial = stats.binom(12, 0.75)  # as often as a group of value 1 is drawn
    np.testing.assert_allclose(12 * np.percentile(dist, [2.5, 97.5]), binomial.ppf([0.025, 0.975]), atol=1e-9)
    np.testing.assert_allclose((dist == 0.75).mean(), binomial.pmf(9), atol=0.01)
    # A second pair of each prompt with the same answer is no further evidence.
    np.testing.assert_array_equal(dist, draw(np.repeat(values, 2), np.repeat(groups, 2)))
    # Groups of different size weigh by their pairs: 3 of 1 and 1 of 0 in each, so no draw can differ from 3/4.
    np.testing.assert_allclose(draw(np.tile([1, 1, 1, 0], 12), np.repeat(groups, 4)), 0.75)
    # Of one prompt the pairs are all there is to draw.
    alone = draw(values, np.zeros(12, int))
    np.testing.assert_array_equal(alone, dist)


@pytest.mark.parametrize("seed", range(4))
def test_the_noise_of_labels_is_recovered(seed):
    margin = margins(3000, seed + 10, scale=3)
    pairs = labelled(margin, seed, noise=0.2, a=2.0)
    found = label_noise.label_noise(pairs.margin)
    assert found["told"] and abs(found["value"] - 0.2) < 0.04 and 0.5 < found["scale"] / 2.0 < 2
    assert found["high"] - found["low"] < 0.1

    def likelihood(eps, a):
        return np.log(eps + (1 - 2 * eps) / (1 + np.exp(-a * pairs.margin))).sum()

    # The best of the grid is near a maximum that no neighbour beats by more than the grid's step can hide.
    best = likelihood(found["value"], found["scale"])
    assert best > likelihood(0.2, 2.0) - 0.5
    assert best > max(
        likelihood(found["value"] + e, found["scale"] * a) for e in (-0.03, 0.03) for a in (0.8, 1.25)
    )


def test_the_noise_of_clean_labels_is_none_and_of_few_is_not_told():
    found = label_noise.label_noise(labelled(margins(3000)).margin)
    assert found["low"] == 0.0 and found["high"] < 0.1
    assert not label_noise.label_noise(labelled(margins(12)).margin)["told"]
    assert label_noise.label_noise(np.zeros(5)) is None and label_noise.label_noise([]) is None
    scale = label_noise.scale_of(labelled(margins(4000), a=3.0).margin)
    assert scale == pytest.approx(3.0, rel=0.15)  # scores in another unit than log-odds


def test_a_model_without_log_odds_is_scaled_first():
    pairs = labelled(10 * margins(2000), a=0.1)
    as_they_are, scaled = measure(pairs), measure(pairs, probabilities=False)
    assert as_they_are["ece"] > 0.15 > 0.05 > scaled["ece"] and scaled["scale"] == pytest.approx(0.1, rel=0.2)
    assert scaled["accuracy"]["value"] == as_they_are["accuracy"]["value"]


def test_a_model_that_measures_length_shows_it():
    found = measure(length_only())
    assert found["length_correlation"] == {
        key: pytest.approx(1.0, abs=1e-3) for key in ("pearson", "spearman", "within_pairs")
    }
    shorter, _, longer = found["by_length"]
    assert shorter["accuracy"]["value"] == 0.0 and longer["accuracy"]["value"] == 1.0
    assert shorter["pairs"] + found["by_length"][1]["pairs"] + longer["pairs"] == 400
    assert found["beyond_length"]["low"] <= 0  # no better than the rule
    fair = measure(healthy(2000))
    assert abs(fair["length_correlation"]["within_pairs"]) < 0.06 and fair["beyond_length"]["low"] > 0.2
    none = measure(Pairs(healthy(50).scores, np.full((50, 2), 20), prompts(50)))
    assert none["length_correlation"]["within_pairs"] is None and none["longer_wins"]["value"] == 0.5


def test_spread_between_answers_and_between_prompts():
    spread = gate_measures.spread_of_samples
    assert spread([[0, 2], [0, 2]]) == {"within": 2**0.5, "between": 0.0, "share": 1.0}
    assert spread([[0, 0], [2, 2]])["share"] == 0.0 and spread([[1, 1], [1, 1]])["share"] == 0.0
    made = spread(samples(within=1.0, between=2.0, B=2000, n=4).scores)
    assert made["share"] == pytest.approx(1 / 5, abs=0.02) and made["between"] == pytest.approx(2, rel=0.05)
    assert measure(flat())["spread"]["share"] < 0.01


def test_the_preview_by_hand():
    found = gate_measures.preview(Samples([[1.0, 3.0], [0.0, 4.0]], [[5, 9], [7, 3]], [[0, 1], [2, -4]]))
    assert found["n"] == [1, 2] and found["gold"] == [-0.25, -1.5] and found["length"] == [6.0, 6.0]
    std = np.std([1, 3, 0, 4])
    np.testing.assert_allclose(found["proxy"], [0.0, 1.5 / std])
    # Changes of the two prompts: 0.5 and -3; their standard error is 3.5 / 2.
    np.testing.assert_allclose(found["gold_error"], [0, 1.75])
    assert gate_measures.preview(Samples([[1.0, 2.0]], [[5, 5]]))["proxy_error"] is None


def test_gold_ceiling_and_sources():
    scores, gold = [[1, 0], [1, 0], [0, 1], [1, 0]], [[1, 0], [0, 1], [0, 1], [2, 2]]
    pairs = Pairs(scores, np.ones((4, 2)), prompts(4), ["b", "a", "b", "b"], gold)
    found = measure(pairs, coin_scale=np.log(3))
    assert found["gold"]["accuracy"]["value"] == pytest.approx(2 / 3) and found["gold"]["pairs"] == 3
    assert found["ceiling"] == pytest.approx((0.75 * 3 + 0.5) / 4)
    assert [(one["source"], one["pairs"]) for one in found["by_source"]] == [("b", 3), ("a", 1)]
    with pytest.raises(ValueError, match="scores has 4 pairs; prompts are 3"):
        Pairs(scores, np.ones((4, 2)), prompts(3))


def test_labels_in_doubt_by_hand():
    """Right and wrong count by how decided a label is; losses and calibration are against the label itself."""
    margin, labels = np.array([2.0, -1.0, 3.0, -3.0]), np.array([1.0, 0.75, 0.5, 0.5])
    found = measure(Pairs(np.stack([margin, 0 * margin], 1), [[9, 3], [3, 9]] * 2, prompts(4), labels=labels))
    assert (found["held_out_pairs"], found["undecided_pairs"]) == (2, 2)
    assert found["accuracy"]["value"] == pytest.approx(1 / 1.5)
    p = 1 / (1 + np.exp(-margin))
    assert found["loss"]["value"] == pytest.approx(
        -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    )
    # Bins of their own, but for the last two, which are as sure and half right each.
    certain = np.maximum(p, 1 - p)
    expected = (1 - certain[0]) + (certain[1] - 0.25) + 2 * (certain[2] - 0.5)
    assert found["ece"] == pytest.approx(expected / 4)
    assert sum(count for *_, count in found["calibration"]) == 8
    assert [(one["pairs"], one["accuracy"] and one["accuracy"]["value"]) for one in found["by_length"]] == [
        (1, 0.0), (0, None), (1, 1.0)
    ]  # fmt: skip
    assert found["longer_wins"]["value"] == pytest.approx(1 / 1.5) and found["beyond_length"]["value"] == 0.0
    for labels in ([1.0, 0.4], [1.0, np.nan], [1.0]):
        with pytest.raises(ValueError, match="labels are .*; expected 2 numbers from 0.5 to 1"):
            Pairs(np.ones((2, 2)), np.ones((2, 2)), prompts(2), labels=labels)


def test_pairs_whose_label_is_a_coin_are_neither_right_nor_wrong():
    some, more = healthy(300), healthy(200)
    both = lambda name: np.concatenate([getattr(some, name), getattr(more, name)])
    names = [*some.prompts, *(f"more {name}" for name in more.prompts)]
    mixed = Pairs(both("scores"), both("tokens"), names, labels=np.repeat([1.0, 0.5], [300, 200]))
    alone, found = measure(some), measure(mixed, some)
    assert found["accuracy"] == alone["accuracy"] and found["accuracy_gap"]["value"] == 0.0
    for key in ("value", "low", "high", "scale"):
        assert found["label_noise"][key] == pytest.approx(alone["label_noise"][key])
    undecided = measure(Pairs(more.scores, more.tokens, more.prompts, labels=np.full(200, 0.5)), some)
    assert undecided["accuracy"] is undecided["accuracy_gap"] is undecided["longer_wins"] is None
    assert undecided["loss"]["value"] > 0.69 and undecided["held_out_pairs"] == 0
    judged = gate.judge(undecided, thresholds())
    assert judged["verdict"] == "warn"
    assert any(
        "labels of all 200 held-out pairs are undecided" in one["sentence"] for one in judged["findings"]
    )
    assert "200 undecided ones left out" in " ".join(
        one["sentence"] for one in gate.judge(found, thresholds())["findings"]
    )


def test_scores_that_are_the_log_odds_of_soft_labels_are_calibrated():
    margin = np.abs(margins(400))
    labels = 1 / (1 + np.exp(-margin))
    scores = np.stack([margin, 0 * margin], 1)
    found = measure(Pairs(scores, np.ones((400, 2)), prompts(400), labels=labels))
    assert found["ece"] < 1e-9 and found["accuracy"]["value"] == 1.0
    assert label_noise.scale_of(5 * margin, labels) == pytest.approx(0.2, rel=0.05)
    assert measure(Pairs(5 * scores, np.ones((400, 2)), prompts(400), labels=labels))["ece"] > 0.1
