"""Reward models with a tokenizer of their own, from one value of a config to a policy that they reward."""

import json
import shutil

import numpy as np
import pytest

from experiments import cli, export, pipeline
from rlhf_jax.errors import InputError, Interrupted
from rlhf_jax.rewards.models import catalogue
from rlhf_jax.training import offline
from rlhf_jax.training.checks import check_config
from rlhf_jax.training.metrics import read_metrics
from tests.experiments.small_runs import run_small, stop_after_each_step

SMALLER = ("reward_model.steps=2", "preferences.num_pairs=32", "data.held_out_pairs=32", "ppo.steps=2",
           "ppo.rollout_epochs=1", "ppo.eval_every_steps=0")  # fmt: skip


def begun(finished, workdir, *files):
    for part in ("base", "roles/sft"):
        shutil.copytree(finished / part, workdir / part)
    for file in files:
        shutil.copy(finished / file, workdir)
    return workdir


PREFERENCES = ("preferences.jsonl", "preferences_held_out.jsonl")


def test_an_encoder_rewards_and_judges_a_policy_and_its_training_resumes(
    finished, one_device, tmp_path, monkeypatch
):
    workdir = begun(finished, tmp_path / "run", *PREFERENCES)
    kind = "reward_model.kind=encoder"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after_each_step(patch, offline)
        run_small(workdir, *SMALLER, kind)
    assert not (workdir / "roles" / "reward_model").exists()
    run_small(workdir, *SMALLER, kind)
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [m["step"] for m in rows if m["stage"] == "reward_model"] == [1, 2]

    role = workdir / "roles" / "reward_model"
    reward, meta = catalogue.encoder(str(role)), json.loads((role / "role.json").read_text())
    assert meta == {"step": 2, "kind": "encoder"}
    pairs = [json.loads(line) for line in (workdir / PREFERENCES[1]).read_text().splitlines()]
    texts = [[row[f"candidate_{row['choice']}"], row[f"candidate_{1 - row['choice']}"]] for row in pairs]
    scores = reward.score([row["input_text"] for row in pairs], texts)
    made = json.loads((workdir / "reward_model.json").read_text())
    assert made["kind"] == "encoder" and made["held_out_pairs"] == len(pairs)
    assert made["accuracy"] == pytest.approx((scores[:, 0] > scores[:, 1]).mean())

    units = json.loads((workdir / "roles" / "ppo" / "role.json").read_text())
    assert units["reward_std"] > 0
    normal = lambda prompts, texts: (
        (reward.score(prompts, texts) - units["reward_mean"]) / units["reward_std"]
    )
    written = [json.loads(line) for line in (workdir / "completions" / "ppo.jsonl").read_text().splitlines()]
    expected = normal([r["prompt"] for r in written], [[r["completion"]] for r in written])
    np.testing.assert_allclose([r["reward"] for r in written], expected[:, 0], atol=1e-3)
    ppo = [m for m in rows if m["stage"] == "ppo"]
    assert len(ppo) == 2 and all(np.isfinite(m["loss"]) and m["invalid_reward_fraction"] == 0 for m in ppo)

    found = json.loads((workdir / "evaluation.json").read_text())
    for side in ("untuned", "tuned"):
        columns = len(found[side]["texts"]) // len(found["prompts"])
        expected = normal(found["prompts"] * columns, [[text] for text in found[side]["texts"]])
        np.testing.assert_allclose(found[side]["reward"], expected[:, 0], atol=1e-3)
    export.command([f"--workdir={workdir}", f"--output={tmp_path / 'rm'}", "--role=reward_model"])
    assert catalogue.encoder(str(tmp_path / "rm")).score(["It"], [[" was"]]) == reward.score(
        ["It"], [[" was"]]
    )


@pytest.mark.parametrize("name", ["pairrm", "steamshp"])
def test_models_that_compare_run_from_their_configs(finished, one_device, tmp_path, name):
    workdir = begun(finished, tmp_path, *PREFERENCES)
    run_small(
        workdir,
        SMALLER[0],
        "data.held_out_pairs=32",
        "stages=('reward_model','gate')",
        config=f"reward_models/{name}",
    )
    rows = [m for m in read_metrics(workdir / "metrics.jsonl") if m["stage"] == "reward_model"]
    assert len(rows) == 2 and all(np.isfinite(m["loss"]) and m["grad_norm"] > 0 for m in rows)
    made = json.loads((workdir / "reward_model.json").read_text())
    assert made["kind"] == name and rows[-1]["eval/accuracy"] == pytest.approx(made["accuracy"], abs=0.04)
    reward = catalogue.MODELS[name](str(workdir / "roles" / "reward_model"))
    even = {"pairrm": 0.0, "steamshp": 0.5}[name]
    scores = reward.score(["It was"], [[" good", " bad and late", " so"]])
    assert scores.mean() == pytest.approx(even, abs=1e-5) and scores.std() > 0
    # Read as RL will: in pairs as when it was judged, and in groups of samples, whose mean is that of equals.
    gate = json.loads((workdir / "gate.json").read_text())["measures"]
    assert gate["accuracy"]["value"] == pytest.approx(made["accuracy"], abs=1e-6)
    assert not gate["probabilities"] and gate["preview"] is not None


def test_an_encoder_learns_from_ratings(finished, one_device, tmp_path):
    workdir = begun(finished, tmp_path)
    changes = ("reward_model.objective=regression", "stages=('preferences','reward_model')")
    run_small(workdir, *SMALLER[:3], *changes, config="reward_models/encoder")
    made = json.loads((workdir / "reward_model.json").read_text())
    assert (
        set(made["own"]["aspects"]) == {"sentiment"} and made["own"]["aspects"]["sentiment"]["records"] == 64
    )
    assert json.loads((workdir / "roles/reward_model/role.json").read_text())["aspects"]["names"] == [
        "sentiment"
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("kind=encoder", "members=2"), "members is 2; expected 1 with kind 'encoder'"),
        (("kind=pairrm", "objective=regression"), "objective is 'regression', which kind encoder has"),
        (("kind=steamshp", "margin_coeff=0.5"), "margin_coeff is 0.5, which only"),
        (("kind=steamshp", "loss=logexp"), "expected logsigmoid"),
        (("kind=encoder", "classification_reward=probability"), "expected logit with kind 'encoder'"),
        (("kind=encoder", "backbone_learning_rate=0.0"), "backbone_learning_rate is 0.0"),
    ],
)
def test_settings_that_a_kind_does_not_have(changes, said):
    config = cli.load_config("configs/ppo.py:tiny", [f"reward_model.{item}" for item in changes])
    with pytest.raises(InputError, match=said):
        check_config(config, tuple(pipeline.STAGES))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("ppo", ("reward_model.kind=encoder", "ppo.value=reward"), "value is 'reward'.*no linear head"),
        (
            "ppo",
            ("reward_model.kind=pairrm", "ppo.num_completions=1"),
            "config.ppo.num_completions is 1, expected 2",
        ),
        ("remax", ("reward_model.kind=pairrm", "remax.num_completions=2"), "the greedy completion.* is 1"),
    ],
)
def test_what_compares_needs_completions_to_compare(name, changes, said):
    config = cli.load_config(f"configs/{name}.py:tiny", list(changes))
    with pytest.raises(InputError, match=said):
        check_config(config, tuple(pipeline.STAGES))
    if name == "ppo" and "ppo.num_completions=1" in changes:
        config.rewards.components = ("sentiment",)
        check_config(config, tuple(pipeline.STAGES))


def test_a_backbone_that_is_not_there_is_missed_before_anything_is_trained(tmp_path):
    with pytest.raises(InputError, match="config.reward_model.backbone: .*missing is not a directory"):
        run_small(tmp_path, "reward_model.kind=encoder", f"reward_model.backbone={tmp_path}/missing")
    assert not (tmp_path / "roles").exists()
