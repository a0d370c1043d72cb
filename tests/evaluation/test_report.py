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

from rlhf_jax.evaluation import curves, load_run, page
from rlhf_jax.evaluation.report import write_report
from tests.evaluation.made_up import evaluation, fill, good_rl, write_lines


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


def test_a_step_is_told_by_its_parts_without_the_first(tmp_path):
    """An update of 3 s at 40% and one of 1 s at 20%, with an evaluation and idle time between; the first compiled."""
    rows = [
        {"step": 1, "step_seconds": 60.0, "time/rollout": 20.0, "time/update": 40.0, "mfu": 0.01},
        {
            "step": 2,
            "step_seconds": 5.0,
            "time/rollout": 1.0,
            "time/update": 2.0,
            "time/evaluate": 2.0,
            "mfu": 0.4,
        },
        {
            "step": 3,
            "step_seconds": 1.0,
            "time/rollout": 0.25,
            "time/update": 0.5,
            "time/other": 0.25,
            "mfu": 0.2,
        },
    ]
    speed = (1.0, 10.0, 70.0)
    rows = [{"stage": "ppo", "tokens_per_second": s, **row} for row, s in zip(rows, speed, strict=True)]
    rows += [{"stage": "dpo", "step": n, "step_seconds": 2.0, "time/update": 2.0} for n in (1, 2)]
    rows += [{"stage": "old", "step": n, "step_seconds": 2.0} for n in (1, 2)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "timing.json").write_text(json.dumps({"phases": [], "peak_flops_source": "4 x v5e"}))
    text = page_of(tmp_path)
    section = text[text.index('<section id="time">') : text.index('<section id="details">')]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in section.split("<tr>")[2:]]
    assert cells == [
        # 6 s in two steps: 1.25, no score, 2.5, 2 and 0.25; 120 tokens; (3 * 0.4 + 1 * 0.2) / 4.
        ["ppo", "3.00", "21%", "–", "42%", "33%", "4.2%", "20.0", "35%"],
        ["dpo", "2.00", "–", "–", "100%", "–", "–", "–", "–"],
    ]
    assert "4 x v5e" in section and "Idle" in section


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


def test_hacked_run_says_so_in_the_headline(tmp_path):
    fill(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(gold_gain=-0.4)))
    words = " ".join(Reader(page_of(tmp_path)).text)
    assert "Reward hacking: the learned reward rose, the true reward fell" in words
