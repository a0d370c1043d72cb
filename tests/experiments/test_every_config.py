"""Every config: it loads at every size, and at tiny it runs two steps with no key unread."""

import importlib.machinery
import json
import math
import pathlib
import shutil
import sys
import types

import numpy as np
import pytest

from experiments import cli, evaluate, export, pipeline
from rlhf_jax.data import sources
from rlhf_jax.errors import InputError, Interrupted
from rlhf_jax.rewards import rules
from rlhf_jax.training.algorithms import ALGORITHMS
from rlhf_jax.training.checks import check_config
from rlhf_jax.training.metrics import read_metrics
from tests.experiments.small_runs import (
    Placements,
    Reads,
    assert_same_policy,
    begun,
    role_tensors,
    run_small,
    stop_after_each_step,
    timeless,
)

UNCOUNTED = ("kto", "ppo_ptx", "quark", "trpo")  # rows with passes that utilisation does not know
ALGORITHM_CONFIGS = sorted(
    path.stem
    for path in pathlib.Path("configs").glob("*.py")
    if path.stem in ALGORITHMS and path.stem not in ("sft", "reward_model", "ppo")
)


def test_config_files_load_at_every_size_and_pass_the_checks():
    for name in ("sft", "reward_model", "ppo", "pipeline", "best_of_n", *ALGORITHM_CONFIGS):
        for size in ("tiny", "smollm2", "llama2_7b", "llama2_13b", "llama2_70b"):
            config = cli.load_config(f"configs/{name}.py:{size}", [])
            check_config(config, tuple(pipeline.STAGES))


@pytest.mark.parametrize("name", ALGORITHM_CONFIGS)
def test_every_algorithm_runs_from_its_config(finished, tmp_path, monkeypatch, name):
    """Two steps after the SFT, preferences and reward model of the finished run, then evaluation and report."""
    workdir = begun(finished, tmp_path / name)
    reads, placements = Reads(monkeypatch), Placements(monkeypatch)
    run_small(workdir, f"{name}.steps=2", f"{name}.batch_size=16", config=name)
    rows = [m for m in read_metrics(workdir / "metrics.jsonl") if m["stage"] == name]
    assert [m["step"] for m in rows] == [1, 2] and all(math.isfinite(m["loss"]) for m in rows)
    assert rows[0]["skipped_updates"] == 0 and rows[1]["grad_norm"] > 0
    assert rows[1]["time/update"] > 0 and ("mfu" in rows[1]) == (name not in UNCOUNTED)
    if ALGORITHMS[name].online:
        assert abs(rows[0]["kl"]) < 1e-4 < abs(rows[1]["kl"])  # the policy starts as the reference, and moves
        assert max(m.get("first_ratio_gap", 0.0) for m in rows) < 1e-3
    else:
        assert "eval/accuracy" in rows[1]
    assert (workdir / "report.html").exists() and (workdir / "roles" / name).exists()
    section = cli.load_config(f"configs/{name}.py:tiny", [])[name]
    assert set(reads.unread(section, name)) == set()
    # Base, roles, reward model, moments, reference, batches. Quark's pool of tokens alone is whole everywhere.
    whole = {array for array in placements.whole if name != "quark" or array[1][0] != section.pool_size}
    assert placements.seen > 10 and whole == set()


RECIPES = sorted(path.stem for path in pathlib.Path("configs/recipes").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load_at_the_size_of_their_papers(name, monkeypatch):
    there = types.ModuleType("math_verify")  # need not be, to be checked
    there.__spec__ = importlib.machinery.ModuleSpec("math_verify", None)
    monkeypatch.setitem(sys.modules, "math_verify", there)
    for size in ("llama2_7b", "llama2_13b"):
        config = cli.load_config(f"configs/recipes/{name}.py:{size}", [])
        check_config(config, tuple(pipeline.STAGES))
        assert config.stages[-1] == "evaluation" and config.gold == ""
        for key in ("sft", "prompts", "preferences", "eval_preferences"):
            spec = config.data[key]
            assert spec == "" or spec.startswith("data/") or sources.HUB_NAME.fullmatch(spec)
        assert config.data.prompts and "preferences" not in config.stages


# The others differ from these, or from the configs above, by values of keys alone, which are checked.
ORDINARY = ("arithmetic", "recipes/dapo", "recipes/vertex_full")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ORDINARY else pytest.mark.slow)
        for name in ("arithmetic", *(f"recipes/{name}" for name in RECIPES))
    ],
)
def test_recipes_run_at_tiny(finished, one_device, tmp_path, name):
    workdir = begun(finished, tmp_path / "run")
    stages = cli.load_config(f"configs/{name}.py:tiny", []).stages
    (stage,) = (s for s in stages if s in ("ppo", "ppo_ptx", "dpo", "grpo"))
    minibatches = () if stage == "dpo" else (f"{stage}.num_minibatches=1", f"{stage}.rollout_epochs=1")
    run_small(workdir, f"{stage}.steps=2", f"{stage}.batch_size=16", *minibatches, config=name)
    rows = [m for m in read_metrics(workdir / "metrics.jsonl") if m["stage"] == stage]
    assert [m["step"] for m in rows] == [1, 2] and all(math.isfinite(m["loss"]) for m in rows)
    assert rows[-1]["skipped_updates"] == 0 and (workdir / "roles" / stage).exists()
    assert (workdir / "report.html").exists()


def test_groups_that_are_replaced_are_the_same_when_resumed(finished, one_device, tmp_path, monkeypatch):
    """Dynamic sampling draws prompts and keys by position; the texts written down are those trained on."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = ("grpo.steps=2", "grpo.batch_size=16", "grpo.num_completions=2", "grpo.max_refills=2",
               "grpo.rollout_epochs=1", "grpo.pack_completions=True",
               "rewards.components=('sentiment',)", "stages=('sft','grpo')")  # fmt: skip
    for workdir in (whole, broken):
        for part in ("base", "roles/sft"):
            shutil.copytree(finished / part, workdir / part)
    run_small(whole, *changes, config="grpo")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after_each_step(patch)
        run_small(broken, *changes, config="grpo")
    run_small(broken, *changes, config="grpo")
    assert_same_policy(whole, broken, "grpo")
    rows = timeless(whole, "grpo")
    assert rows == timeless(broken, "grpo") and all(m["refills"] >= 1 for m in rows)
    assert all(m["filled_fraction"] > 1 - m["zero_variance_fraction"] for m in rows)
    texts = [(workdir / "completions" / "grpo.jsonl").read_text() for workdir in (whole, broken)]
    assert texts[0] == texts[1]
    for row in map(json.loads, texts[0].splitlines()):
        assert row["reward"] == pytest.approx(
            rules.sentiment([row["prompt"]], [row["completion"]])[0], abs=1e-6
        )


def test_a_run_with_a_memory_resumes_with_the_same_bits(finished, one_device, tmp_path, monkeypatch):
    """Quark stopped after its first step ends as the unbroken run: the pool is part of the state. Its
    quantile's tokens are in role.json, read by evaluation and told by export."""
    workdirs = [tmp_path / name for name in ("whole", "broken")]
    settings = ("quark.steps=2", "quark.batch_size=16", "quark.train=lora", "logging.save_every_steps=1")
    for workdir in workdirs:
        begun(finished, workdir)
    run_small(workdirs[0], *settings, config="quark")
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="Run the same command"):
        stop_after_each_step(patch)
        run_small(workdirs[1], *settings, config="quark")
    run_small(workdirs[1], *settings, config="quark")
    whole, broken = (role_tensors(workdir, "quark") for workdir in workdirs)
    for name in whole:
        np.testing.assert_array_equal(whole[name], broken[name], err_msg=name)
    assert (workdirs[0] / "evaluation.json").read_text() == (workdirs[1] / "evaluation.json").read_text()

    suffix = json.loads((workdirs[0] / "roles" / "quark" / "role.json").read_text())["prompt_suffix_ids"]
    assert len(suffix) >= 1
    export.command([f"--workdir={workdirs[0]}", f"--output={tmp_path / 'merged'}", "--merge"])
    assert str(suffix) in (tmp_path / "merged" / "README.md").read_text()
    role = workdirs[1] / "roles" / "quark" / "role.json"
    role.write_text(role.read_text().replace("prompt_suffix_ids", "something_else"))
    evaluate.command([f"--workdir={workdirs[1]}"])
    one, other = (json.loads((w / "evaluation.json").read_text()) for w in workdirs)
    assert one["untuned"] == other["untuned"] and one["tuned"]["kl"] != other["tuned"]["kl"]


def test_best_of_n_of_the_base_is_judged_as_a_policy(finished, one_device, tmp_path):
    workdir = begun(finished, tmp_path / "best")
    run_small(workdir, "evaluation.best_of=4", config="best_of_n")
    found = json.loads((workdir / "evaluation.json").read_text())
    summary, bound = found["summary"], math.log(4) - 0.75
    assert summary["tuned/reward"] > summary["untuned/reward"]
    assert summary["tuned/kl"] == pytest.approx(bound, abs=1e-4)
    assert found["best_of"]["n"] == 4 and found["best_of"]["curve"]["n"] == [1, 2, 4]
    # All samples with the same reward model: the curve begins near the plain mean and rises.
    assert np.all(np.diff(found["best_of"]["curve"]["reward"]) > 0)
    # The first draw of each prompt is the one that the untuned side makes: the best is at least as good.
    assert np.all(np.array(found["tuned"]["reward"]) >= np.array(found["untuned"]["reward"]) - 1e-6)
    with pytest.raises(InputError, match="best_of is 2.*temperature above 0"):
        evaluate.command(
            [f"--workdir={workdir}", "--config.evaluation.best_of=2", "--config.evaluation.temperature=0.0"]
        )
