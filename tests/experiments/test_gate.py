"""The gate as a stage and as a command, on reward models that were really trained: one that is sound, and one that
learned its few noisy pairs by heart, as the published Vertex run did."""

import json
import random
import shutil

import pytest

from experiments import cli, evaluate, gate, pipeline
from experiments import run as run_command
from rlhf_jax.data import tiny_corpus
from rlhf_jax.data.formats import Pair
from rlhf_jax.evaluation import gate_page
from rlhf_jax.training.algorithms.reward_models import KINDS
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.run import Run
from tests.experiments.small_runs import assert_same_policy, copy_without, run_small


def test_a_finished_run_was_judged_before_rl(finished):
    found = json.loads((finished / "gate.json").read_text())
    measures = found["measures"]
    quality = json.loads((finished / "reward_model.json").read_text())
    assert measures["held_out_pairs"] == quality["held_out_pairs"]
    assert measures["ceiling"] == pytest.approx(quality["ceiling"])
    # Scores are those of the end of its training, but for completions that were cut there: RL ends these, too.
    rows = [json.loads(line) for line in open(finished / "preferences_held_out.jsonl")]
    run = Run(cli.load_saved(str(finished), []), str(finished), None, None)
    longest = run.config.data.completion_tokens + 1
    ends = [
        run.tokenizer.encode_completion(row[f"candidate_{row['choice']}"], longest, allow_truncation=True)[-1]
        for row in rows
    ]
    both = zip(measures["points"]["chosen"], quality["chosen"], ends, strict=True)
    uncut = [(score, then) for (score, _), then, end in both if end in run.eos_ids]
    assert len(uncut) > 4 and all(score == pytest.approx(then, abs=2e-4) for score, then in uncut)
    preview = measures["preview"]
    assert preview["prompts"] == 8 and preview["n"] == [1, 2, 4] and len(preview["gold"]) == 3
    assert preview["proxy"][0] == pytest.approx(0, abs=1e-6) and preview["proxy"][2] > preview["proxy"][1] > 0
    assert gate_page.TITLE in (finished / "report.html").read_text()


def test_rl_is_the_same_with_and_without_it(finished, tmp_path):
    workdir = copy_without(
        finished, tmp_path / "no_gate", "gate.json", "roles/ppo", "checkpoints/ppo", "report.html"
    )
    run_small(workdir, "stages=('sft','preferences','reward_model','ppo')")
    assert_same_policy(finished, workdir)
    assert not (workdir / "gate.json").exists()
    # Where RL is over there is nothing left to guard: a workdir of before the gate is done.
    whole = cli.load_saved(str(finished), [])
    assert pipeline.is_done(Run(whole, str(workdir), None, None), "gate")


def preferences(path, count, noise, seed):
    """Good against bad endings; a label is turned round with probability `noise`."""
    draw = random.Random(seed)
    ending = lambda words: (
        f" {draw.choice(tiny_corpus.SUBJECTS)} {draw.choice(tiny_corpus.VERBS)} {draw.choice(words)}."
    )
    with open(path, "w") as file:
        for i in range(count):
            pair = [ending(tiny_corpus.GOOD), ending(tiny_corpus.BAD)]
            chosen, rejected = reversed(pair) if draw.random() < noise else pair
            file.write(json.dumps({"prompt": f"Visit {i}:", "chosen": chosen, "rejected": rejected}) + "\n")
    return path


def train(finished, workdir, *, pairs, noise):
    """argv of a run of a reward model on `pairs` pairs, and the gate."""
    for part in ("base", "roles/sft"):
        shutil.copytree(finished / part, workdir / part)
    data = preferences(workdir.parent / "pairs.jsonl", pairs, noise, seed=0)
    held_out = preferences(workdir.parent / "held_out.jsonl", 96, noise, seed=1)
    settings = ("stages=reward_model,gate", f"data.preferences={data}", f"data.eval_preferences={held_out}",
                "reward_model.steps=24", "reward_model.batch_size=32", "reward_model.train=full",
                "reward_model.pooling=mean", "reward_model.optimizer.schedule=constant",
                "reward_model.center_coeff=0.0", "gate.preview_prompts=0")  # fmt: skip
    return [
        "--config=configs/ppo.py:tiny",
        f"--workdir={workdir}",
        *(f"--config.{item}" for item in settings),
    ]


def test_a_reward_model_that_learned_by_heart_is_refused(finished, one_device, tmp_path, capsys, monkeypatch):
    """The loss falls from a coin's to about 0.003 in many passes over few pairs, as in the published run."""
    workdir = tmp_path / "run"
    argv = train(finished, workdir, pairs=64, noise=0.4)
    with pytest.raises(SystemExit) as ended:
        cli.main(run_command.command, argv)
    losses = [row["loss"] for row in read_metrics(workdir / "metrics.jsonl")]
    assert losses[0] > 0.5 and losses[-1] < 0.02
    said = capsys.readouterr().err
    assert ended.value.code == 3 and said.count("error: ") == 1 and "Traceback" not in said
    assert "by heart after 12 passes over 64 pairs: 100% right on its training pairs" in said
    assert "--config.gate.on_refusal=warn" in said and str(workdir / "gate.html") in said
    found = json.loads((workdir / "gate.json").read_text())
    assert found["verdict"] == "refuse" and found["findings"][0]["name"] == "Memorised"
    assert (
        found["measures"]["accuracy"]["high"] < 0.75 and found["measures"]["train_accuracy"]["value"] == 1.0
    )
    assert gate_page.HEADLINES["refuse"][1] in (workdir / "gate.html").read_text()

    # Again: refused again, from what was measured. Then, told to go on, it does.
    monkeypatch.setattr(gate, "measured", lambda *args: pytest.fail("it was measured twice"))
    monkeypatch.setitem(pipeline.STAGES, "ppo", lambda run: print("on to RL"))
    with pytest.raises(SystemExit):
        cli.main(run_command.command, argv)
    run_command.command([*argv, "--config.gate.on_refusal=warn", "--config.stages=reward_model,gate,ppo"])
    told = capsys.readouterr().out
    assert "warning: gate: refuse. It knows its training pairs by heart" in told or "on to RL" in told
    assert "on to RL" in told


def test_a_sound_reward_model_passes_as_a_stage_and_by_the_command(finished, one_device, tmp_path, capsys):
    workdir, output = tmp_path / "run", tmp_path / "out"
    run_command.command(train(finished, workdir, pairs=768, noise=0.1))
    found = json.loads((workdir / "gate.json").read_text())
    assert found["verdict"] == "pass", found["reason"]
    assert not (workdir / "gate.html").exists()
    assert abs(found["measures"]["label_noise"]["value"] - 0.1) < 0.08

    # A workdir of before there was a gate has no such section; and these labels are the opposite of what it learned.
    config = json.loads((workdir / "config.json").read_text())
    del config["gate"]
    (workdir / "config.json").write_text(json.dumps(config))
    other = preferences(tmp_path / "other.jsonl", 60, 1.0, seed=2)
    (tmp_path / "pairs.jsonl").unlink()  # what it was trained on is gone, too
    flags = [
        f"--reward_model={workdir}",
        f"--data={other}",
        f"--output={output}",
        "--config.gate.preview_prompts=0",
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main(evaluate.command, flags)
    told = capsys.readouterr()
    assert ended.value.code == 3 and "trained on noise" in told.err
    assert "the pairs that it was trained on are not there" in told.out and "gate.html" in told.out
    judged = json.loads((output / "gate.json").read_text())
    assert judged["about"]["data"] == str(other) and judged["measures"]["accuracy"]["value"] < 0.2
    assert judged["measures"]["train_accuracy"] is None and (output / "gate.html").exists()


def test_wrong_flags_of_the_command(finished, tmp_path, capsys):
    for flags, said in (
        ([f"--reward_model={finished}"], "--reward_model needs --data"),
        ([f"--workdir={finished}", "--data=x.jsonl"], "go with --reward_model=WORKDIR"),
        ([f"--reward_model={finished}", f"--data={tmp_path}/x.jsonl"], "no such file"),
        ([f"--reward_model={tmp_path}", "--data=x.jsonl"], "config.json does not exist"),
        ([f"--reward_model={finished}", "--data=x", "--config.gate.min_accuracy=2.0"], "between 0 and 1"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(evaluate.command, flags)
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_without_a_learned_reward_there_is_nothing_to_judge(tmp_path):
    config = cli.load_config("configs/grpo.py:tiny", ["rewards.components=('sentiment',)"])
    assert "gate" in config.stages and pipeline.is_done(Run(config, str(tmp_path), None, None), "gate")
    learned = cli.load_config("configs/grpo.py:tiny", [])
    assert not pipeline.is_done(Run(learned, str(tmp_path), None, None), "gate")


def test_a_pair_whose_label_doubts_it_is_judged_the_other_way_round():
    labels = (None, 0.75, 0.5, 0.25)
    records = [Pair("p", "a", "b", label) for label in labels]
    found = gate.as_pairs(records, KINDS["pairwise"].pairs(records))
    assert [(one.chosen, one.rejected, one.soft_label) for one in found] == [
        ("a", "b", None), ("a", "b", 0.75), ("a", "b", 0.5), ("b", "a", 0.75)
    ]  # fmt: skip
    assert gate.doubted(gate.Judged("p", "a", "b", gold=(1.0, -1.0)), 0.0).gold == (-1.0, 1.0)
    scores = [[[2.0, 0.0]] * 3, [[0.0, 2.0]]]
    pairs = gate._pairs(found, scores, [([1], [1, 2])] * 4)
    assert pairs.labels.tolist() == [1.0, 0.75, 0.5, 0.75]
