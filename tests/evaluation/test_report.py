"""The report of a made-up run: complete, inert, self-contained; and the warning signs on runs made to show
them."""

import base64
import collections
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest

from rlhf_jax.evaluation import curves, load_run, monitors, page
from rlhf_jax.evaluation.report import write_report

ATTACK = '<script>alert(1)</script><img src=x onerror=alert(2)> "quoted" \x1b[31m\u202e \ud83c $x^2$'


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def noise(count, seed=0):
    return np.random.default_rng(seed).normal(size=count)


def rising(count, start, end):
    return start + (end - start) * (1 - np.exp(-np.arange(count) / (count / 4)))


def metric_rows(stage="ppo", count=60, **series):
    """One row a step; each metric an array of `count`."""
    columns = {name: np.broadcast_to(values, count).tolist() for name, values in series.items()}
    return [
        {
            "stage": stage,
            "step": i + 1,
            "time": 1.0 + i,
            **{name: column[i] for name, column in columns.items()},
        }
        for i in range(count)
    ]


def good_rl(count=60):
    return metric_rows(
        count=count,
        reward=rising(count, 0.0, 1.5) + 0.1 * noise(count),
        reward_std=1.0,
        gold_reward=rising(count, 0.1, 0.6) + 0.05 * noise(count, 1),
        kl=rising(count, 0.0, 6.0),
        entropy=rising(count, 3.0, 2.4),
        loss=0.1,
        explained_variance=rising(count, -0.2, 0.6),
        clip_fraction=0.05,
        completion_length=20.0,
    )


def good_reward_model(count=40):
    rows = metric_rows(
        "reward_model", count, loss=rising(count, 0.69, 0.55), accuracy=rising(count, 0.5, 0.74), margin=0.5
    )
    rows[9]["eval/accuracy"], rows[39]["eval/accuracy"] = 0.6, 0.7
    return rows


def evaluation(count=24, reward_gain=1.5, gold_gain=0.5, kl=6.0, length_ratio=1.0):
    reward, gold = noise(count, 2), 0.2 * noise(count, 3)
    return {
        "num_prompts": count,
        "untuned": {
            "reward": reward.tolist(),
            "gold_reward": gold.tolist(),
            "completion_length": [20.0] * count,
            "finished": [False] * count,
        },
        "tuned": {
            "reward": (reward + reward_gain + 0.1 * noise(count, 4)).tolist(),
            "gold_reward": (gold + gold_gain + 0.1 * noise(count, 5)).tolist(),
            "completion_length": [20.0 * length_ratio] * count,
            "finished": [i % 2 == 0 for i in range(count)],
            "kl": (kl + 0.3 * noise(count, 6)).tolist(),
        },
        "prompts": [f"prompt {i}" for i in range(count)],
        "gold_name": "sentiment (VADER compound, -1..1)",
        "summary": {"reward_gain": reward_gain},
        "sampling": {"temperature": 1.0, "max_new_tokens": 20},
    }


def answers(texts):
    return [
        {"inputs": {"inputs_pretokenized": f"prompt {i}", "targets_pretokenized": ""}, "prediction": text}
        for i, text in enumerate(texts)
    ]


def varied(count=24, seed=0):
    """Completions with few word pairs in common."""
    draw = np.random.default_rng(seed)
    return [" ".join(f"w{k}" for k in draw.integers(0, 300, 15)) for _ in range(count)]


def fill(path):
    """A workdir with every file of a good run, and hostile text in each place that text can come from."""
    untuned, tuned = varied(seed=1), varied(seed=2)
    tuned[2] = ATTACK
    write_lines(path / "eval_results_untuned.jsonl", answers(untuned))
    write_lines(path / "eval_results_tuned.jsonl", answers(tuned))
    write_lines(path / "metrics.jsonl", good_reward_model() + metric_rows("sft", 5, loss=1.0) + good_rl())
    samples = [
        {"step": s, "prompt": ATTACK, "completion": ATTACK, "reward": 1.0, "kl": None} for s in range(1, 9)
    ]
    write_lines(path / "completions" / "ppo.jsonl", samples)
    scores = noise(50, 7)
    files = {
        "config": {"model": ATTACK, "stages": ["reward_model", "ppo"]},
        "evaluation": evaluation(),
        "environment": {"versions": {"jax": "0.10.2"}, "seed": 0},
        "timing": {"phases": [["reward model", 61.0], [ATTACK, 3.0]], "peak_memory_bytes": 2**31},
        "reward_model": {
            "train_pairs": 1000,
            "held_out_pairs": 200,
            "accuracy": 0.70,
            "gold_accuracy": 0.8,
            "ceiling": 0.76,
            "calibration": [[0.2, 0.25, 10], [0.5, 0.5, 30], [0.8, 0.7, 10]],
            "chosen": (scores + 0.5).tolist(),
            "rejected": (scores - 0.5).tolist(),
            "gold": [[float(s), float(s > 0)] for s in scores],
        },
    }
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and the text of scripts, and checks that tags are closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.scripts, self.open, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)


def page_of(workdir):
    with open(write_report(workdir), encoding="utf-8") as file:
        return file.read()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("good_run")
    fill(workdir)
    text = page_of(workdir)
    return workdir, text, Reader(text)


def test_every_section_is_there_and_the_page_is_small(full):
    workdir, text, reader = full
    ids = {value for _, name, value in reader.attributes if name == "id"}
    expected = "changes signs stage-ppo spread samples through-stage-ppo reward-model stage-sft time details"
    assert set(expected.split()) <= ids
    links = [value for tag, name, value in reader.attributes if tag == "a" and name == "href"]
    assert {link[1:] for link in links} <= ids
    assert len(text.encode()) < 2e6
    assert load_run(workdir).problems == ()
    assert {path.name for path in workdir.iterdir()} & {"report.html", "report.html.new"} == {"report.html"}


def test_the_verdict_comes_first_and_agrees_with_the_numbers(full):
    _, text, reader = full
    data = evaluation()
    words = " ".join(reader.text)
    assert "Tuning worked" in words
    gain = np.mean(data["tuned"]["gold_reward"]) - np.mean(data["untuned"]["gold_reward"])
    spread = np.std(np.subtract(data["tuned"]["gold_reward"], data["untuned"]["gold_reward"]), ddof=1)
    assert f"(change +{gain:.2f} ± {1.96 * spread / np.sqrt(24):.2f})" in words
    assert text.index("Tuning worked") < text.index("What changed")


def test_text_of_models_is_inert(full):
    _, text, reader = full
    assert reader.scripts == [page.SCRIPT]
    assert "img" not in reader.tags
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in "".join(reader.text)  # there, as text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_only_the_static_script_may_run(full):
    _, _, reader = full
    [policy] = [value for _, name, value in reader.attributes if name == "content" and "default-src" in value]
    digest = base64.b64encode(hashlib.sha256(reader.scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}';" in policy


def test_nothing_is_fetched_from_anywhere(full):
    _, text, reader = full
    assert not re.search(r"https?://|//\w+\.\w+|@import", text)
    for _, name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#")
    assert not re.search(r"url\((?!#)", text)


def test_figures_share_no_ids_and_follow_the_theme(full):
    _, text, reader = full
    ids = collections.Counter(value for _, name, value in reader.attributes if name == "id")
    assert max(ids.values()) == 1
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {
        value[1:] for tag, name, value in reader.attributes if tag == "use" and name == "href"
    }
    assert used <= set(ids)
    svg = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--reward)" in svg
    assert not re.search(r"(?:fill|stroke): #(?!none)", svg)  # every colour is a variable
    roles = set(re.findall(r"var\(--([a-z]+)\)", svg))
    assert all(page.STYLE.count(f"--{role}: ") == 2 for role in roles)  # light and dark


def test_report_is_the_same_when_made_again(full):
    workdir, text, _ = full
    assert page_of(workdir) == text


@pytest.mark.parametrize("stage", ["ppo", "a <b>$stage", None])
def test_metrics_alone_or_nothing_give_a_page(tmp_path, stage):
    if stage:
        write_lines(tmp_path / "metrics.jsonl", [{**row, "stage": stage} for row in good_rl(12)])
    reader = Reader(page_of(tmp_path))
    assert "Not evaluated on held-out prompts yet" in " ".join(reader.text)
    assert ("svg" in reader.tags) == bool(stage)
    assert (curves.save_summary_png(tmp_path) is None) == (stage is None)


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    fill(tmp_path)
    (tmp_path / "config.json").write_text("{torn")
    (tmp_path / "timing.json").write_text("[1, 2]")
    evaluated = evaluation()
    evaluated["tuned"] = None
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluated))
    (tmp_path / "reward_model.json").write_text(
        '{"calibration": 5, "chosen": "x", "gold": [[1], null, ["a", 2]]}'
    )
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'not json\n[1]\n{"stage": "ppo", "step": 61, "rew')
    words = " ".join(Reader(page_of(tmp_path)).text)
    assert "config.json could not be read" in words
    assert "timing.json is not a JSON object" in words
    assert "metrics.jsonl: 2 damaged lines" in words  # the torn end is normal in a run that goes on
    assert "Training the policy (ppo)" in words


def test_other_rl_stages_are_known_by_their_kl(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{**row, "stage": "grpo"} for row in good_rl()])
    run = load_run(tmp_path)
    assert run.rl_stages() == ["grpo"]
    assert "Training the policy (grpo)" in page_of(tmp_path)


def test_series_is_sorted_with_the_last_of_a_repeated_step_and_without_nulls(tmp_path):
    rows = [(3, 1.0), (1, 5.0), (3, 2.0), (4, None), (5, True)]
    write_lines(tmp_path / "metrics.jsonl", [{"stage": "a", "step": s, "x": x} for s, x in rows])
    steps, values = load_run(tmp_path).series("a", "x")
    np.testing.assert_array_equal(steps, [1, 3, 5])
    np.testing.assert_array_equal(values, [5.0, 2.0, 1.0])


def test_error_of_a_change_is_over_prompts_not_completions(tmp_path):
    # Two completions of each of three prompts, first ones first. Changes by prompt: (1 + 3) / 2, 4, 6.
    found = {
        "num_prompts": 3,
        "untuned": {"reward": [0.0] * 6},
        "tuned": {"reward": [1.0, 4.0, 6.0, 3.0, 4.0, 6.0]},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    assert load_run(tmp_path).change("reward") == pytest.approx((0.0, 4.0, 4.0, 2.0 / np.sqrt(3)))
    found["tuned"]["reward"][0] = None  # its prompt is left with one score, 3
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    assert load_run(tmp_path).change("reward")[3] == pytest.approx(np.std([3, 4, 6], ddof=1) / np.sqrt(3))
    assert load_run(tmp_path).change("gold_reward") is None


def test_summary_png_is_a_picture(full):
    from PIL import Image

    workdir, _, _ = full
    with Image.open(curves.save_summary_png(workdir)) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        colours = image.convert("RGB").getcolors(maxcolors=2**24)
    assert len(colours) > 50


def test_spearman_shares_ranks_of_ties():
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5
    assert curves.spearman(np.array([0.0, 1, 1, 9]), np.array([1.0, 2, 3, 4])) == pytest.approx(
        4.5 / np.sqrt(22.5)
    )
    assert curves.spearman(np.zeros(3), np.arange(3.0)) == 0.0


# --- warning signs
# -----------------------------------------------------------------------------------------------


def signs(path, **options):
    """{name without its stage: verdict}"""
    return {
        finding.name.split(" (ppo")[0]: finding.verdict for finding in monitors.warning_signs(path, **options)
    }


def test_a_good_run_raises_nothing(full):
    workdir, _, _ = full
    found = signs(workdir)
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


def test_hacked_run_says_so_in_the_headline(tmp_path):
    fill(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(gold_gain=-0.4)))
    words = " ".join(Reader(page_of(tmp_path)).text)
    assert "Reward hacking: the learned reward rose, the true reward fell" in words


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
