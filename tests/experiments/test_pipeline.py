"""The whole road at a size that takes seconds, on 8 virtual devices: files, resume, and what a second run says."""

import json
import math
import os
import shutil

import numpy as np
import pytest

from experiments import cli, evaluate, export, pipeline
from rlhf_jax.errors import InputError, Interrupted, NumericsError
from rlhf_jax.training import loop
from rlhf_jax.training.metrics import read_metrics
from tests.experiments.small_runs import (
    assert_same_policy,
    copy_without,
    run_small,
    stop_after_each_step,
    timeless,
)


def test_every_key_of_the_config_is_read(first_run):
    config = cli.load_config("configs/pipeline.py:tiny", [])
    # These name data that replaces what the pipeline makes.
    assert set(first_run[1].unread(config)) <= {"config.data.eval_preferences", "config.data.max_bad_records"}


def test_every_file_of_the_contract_is_there(finished):
    for name in ("config.json", "metrics.jsonl", "tensorboard", "checkpoints/ppo", "completions/ppo.jsonl",
                 "eval_results_untuned.jsonl", "eval_results_tuned.jsonl", "report.html", "summary.png"):  # fmt: skip
        assert (finished / name).exists(), name
    metrics = read_metrics(finished / "metrics.jsonl")
    assert [(m["stage"], m["step"]) for m in metrics] == [
        (stage, step)
        for stage, steps in (("sft", 12), ("reward_model", 6), ("ppo", 4))
        for step in range(1, steps + 1)
    ]
    last = metrics[-1]
    for name in ("reward", "reward_std", "gold_reward", "kl", "kl_coeff", "entropy", "approx_kl", "clip_fraction",
                 "ratio_mean", "value_loss", "explained_variance", "completion_length", "finished_fraction", "loss",
                 "grad_norm", "learning_rate", "tokens_per_second", "eval/reward", "eval/gold_reward",
                 "eval/kl"):  # fmt: skip
        assert math.isfinite(last[name]), name
    assert_times(metrics, json.loads((finished / "timing.json").read_text()))
    sides = [
        [json.loads(line) for line in open(finished / f"eval_results_{s}.jsonl")]
        for s in ("untuned", "tuned")
    ]
    assert [row["inputs"] for row in sides[0]] == [row["inputs"] for row in sides[1]] and len(sides[0]) == 16
    assert set(sides[0][0]) == {"inputs", "prediction"}
    assert set(sides[0][0]["inputs"]) == {"inputs_pretokenized", "targets_pretokenized"}


def assert_times(metrics, timing):
    """Every step says where its time went: never more of it than went by from the first step to the last."""
    for stage, parts in (
        ("sft", {"update"}),
        ("reward_model", {"update"}),
        ("ppo", {"rollout", "score", "update"}),
    ):
        rows, shared = [m for m in metrics if m["stage"] == stage], {f"time/{part}" for part in parts}
        times = [{name: s for name, s in m.items() if name.startswith("time/")} for m in rows]
        assert set(times[0]) == shared, stage
        assert all(set(one) - {"time/evaluate"} == shared | {"time/other"} for one in times[1:]), stage
        assert set(times[-1]) >= ({"time/evaluate"} if stage != "sft" else set())
        assert all(seconds >= 0 for one in times for seconds in one.values())
        by_hand = sum(sum(one.values()) for one in times)
        assert by_hand <= sum(m["step_seconds"] for m in rows) + 0.05, stage
        assert all(0 < m["mfu"] < 1 for m in rows), stage
    assert timing["peak_flops"] > 0 and timing["peak_flops_source"].startswith("1 x cpu, float32")


def test_the_first_update_of_a_rollout_starts_at_ratio_one(finished):
    """The log-probabilities of the sampler are those of the trainer, so nothing is recomputed and nothing drifts."""
    gaps = [m["first_ratio_gap"] for m in read_metrics(finished / "metrics.jsonl") if m["stage"] == "ppo"]
    assert max(gaps) < 1e-4
    first = next(m for m in read_metrics(finished / "metrics.jsonl") if m["stage"] == "ppo")
    assert abs(first["kl"]) < 1e-4  # the policy starts as the reference


def test_a_second_run_says_it_is_done_and_computes_nothing(finished, capsys, monkeypatch):
    monkeypatch.setattr(
        pipeline, "STAGES", dict.fromkeys(pipeline.STAGES, lambda run: pytest.fail("a stage ran"))
    )
    run_small(finished)
    assert "are done" in capsys.readouterr().out


def test_another_config_in_the_same_workdir_is_refused(finished):
    with pytest.raises(InputError, match=r"ppo.kl_coeff: was 0.05, is 0.3"):
        run_small(finished, "ppo.kl_coeff=0.3")


def test_resuming_gives_the_same_bits_at_every_step(finished, tmp_path, monkeypatch):
    """Stopped by a signal after each step of PPO in turn, the run ends with the policy of the unbroken one."""
    workdir = copy_without(finished, tmp_path / "broken", "roles/ppo", "checkpoints/ppo", "report.html")
    stop_after_each_step(monkeypatch)
    for _ in range(3):
        with pytest.raises(Interrupted, match="Run the same command"):
            run_small(workdir)
    monkeypatch.undo()
    run_small(workdir)
    assert_same_policy(finished, workdir)
    assert [m["step"] for m in timeless(workdir, "ppo")] == [1, 2, 3, 4]
    assert timeless(workdir, "ppo") == timeless(finished, "ppo")


def test_changed_data_is_refused_on_resume(finished, tmp_path):
    workdir = copy_without(finished, tmp_path / "other", "roles/reward_model", "roles/ppo", "report.html")
    path = workdir / "preferences.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(InputError, match="first_record"):
        run_small(workdir)


def test_updates_that_stay_non_finite_end_the_run_with_the_state_saved(finished, tmp_path):
    workdir = copy_without(finished, tmp_path / "nan", "roles/ppo", "checkpoints/ppo", "report.html")
    head = workdir / "roles" / "reward_model" / "head.safetensors"
    from safetensors.numpy import load_file, save_file

    save_file({name: np.full_like(x, np.nan) for name, x in load_file(head).items()}, head)
    with pytest.raises(NumericsError, match="score that is not finite"):  # the gate sees it first
        run_small(workdir)
    with pytest.raises(NumericsError, match="rewards were NaN"):
        run_small(workdir, "stages=('sft','preferences','reward_model','ppo')")
    assert (workdir / "checkpoints" / "ppo").exists()


def test_evaluate_command_makes_the_results_again(finished, tmp_path):
    workdir = copy_without(finished, tmp_path / "again", "evaluation.json", "eval_results_tuned.jsonl")
    evaluate.command([f"--workdir={workdir}"])
    assert (workdir / "eval_results_tuned.jsonl").read_text() == (
        finished / "eval_results_tuned.jsonl"
    ).read_text()


def test_exported_weights_are_base_and_adapter(finished, tmp_path):
    import jax.numpy as jnp

    from rlhf_jax.checkpoints import huggingface, peft
    from rlhf_jax.models.llama import Llama

    export.command([f"--workdir={finished}", f"--output={tmp_path / 'merged'}", "--merge"])
    export.command([f"--workdir={finished}", f"--output={tmp_path / 'adapter'}"])
    config, merged = huggingface.load_llama(str(tmp_path / "merged"))
    _, base = huggingface.load_llama(str(tmp_path / "adapter" / "base"))
    adapter, _ = peft.load_adapter(str(tmp_path / "adapter"), config)
    ids = jnp.arange(12)[None]
    beside = Llama(config).apply({"params": base}, ids, jnp.ones_like(ids), adapter)
    inside = Llama(config).apply({"params": merged}, ids, jnp.ones_like(ids))
    np.testing.assert_allclose(beside, inside, atol=1e-4)
    assert (
        float(jnp.abs(inside - Llama(config).apply({"params": base}, ids, jnp.ones_like(ids))).max()) > 1e-3
    )


def test_the_stop_request_is_set_by_sigterm_and_handlers_are_put_back():
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with loop.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(Interrupted):
            stop.check("a test")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("value", ["own", "reward"])
def test_a_value_network_of_its_own(finished, one_device, tmp_path, value):
    """Two steps with it; only one that starts as the reward model predicts anything at the first."""
    workdir = tmp_path / value
    workdir.mkdir()
    for name in ("base", "roles/sft", "roles/reward_model"):
        shutil.copytree(finished / name, workdir / name)
    run_small(workdir, "stages=('sft','reward_model','ppo')", f"ppo.value={value}", "ppo.steps=2")
    ppo = [m for m in read_metrics(workdir / "metrics.jsonl") if m["stage"] == "ppo"]
    assert [m["step"] for m in ppo] == [1, 2] and all(math.isfinite(m["value_loss"]) for m in ppo)
    zero_head = [m for m in read_metrics(finished / "metrics.jsonl") if m["stage"] == "ppo"][0]
    same = ppo[0]["explained_variance"] == zero_head["explained_variance"]
    assert same == (value == "own")  # zeros explain nothing; the reward model says something from the start


def test_a_policy_is_tuned_on_functions_without_a_reward_model(
    finished, one_device, tmp_path, monkeypatch, capsys
):
    (tmp_path / "mine.py").write_text(
        "def short(completions, input_text):\n    return [1.0 / (1 + len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    workdir = tmp_path / "out"
    workdir.mkdir()
    for part in ("base", "roles/sft"):
        shutil.copytree(finished / part, workdir / part)
    run_small(
        workdir,
        "grpo.steps=2",
        "grpo.batch_size=16",
        "grpo.pack_completions=True",
        "stages=('sft','grpo','evaluation')",
        "rewards.components=('mine:short','sentiment')",
        "rewards.weights=(1.0,0.5)",
        config="grpo",
    )
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    total = last["reward/short"] + 0.5 * last["reward/sentiment"]
    assert last["reward"] == pytest.approx(total, abs=1e-6) and last["failed_reward_fraction"] == 0
    assert "gold_reward" not in last  # sentiment is trained on here, so it judges nothing
    summary = json.loads((workdir / "evaluation.json").read_text())["summary"]
    assert math.isfinite(summary["tuned/reward"]) and "tuned/gold_reward" not in summary
    assert "true reward" not in capsys.readouterr().out
