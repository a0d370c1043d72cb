"""The whole road at a size that takes seconds, on 8 virtual devices: files, resume, and what a second run says."""

import functools
import json
import math
import os
import pathlib
import shutil

import numpy as np
import pytest
from ml_collections.config_dict import ConfigDict

from experiments import cli, evaluate, export, pipeline
from experiments import run as run_command
from rlhf_jax.errors import InputError, Interrupted, NumericsError
from rlhf_jax.rewards import rules
from rlhf_jax.training import loop, online
from rlhf_jax.training.algorithms import ALGORITHMS
from rlhf_jax.training.metrics import read_metrics

SMALL = [
    "sft.steps=12",
    "preferences.num_pairs=64",
    "preferences.batch_size=32",
    "reward_model.steps=6",
    "ppo.steps=4",
    "ppo.batch_size=16",
    "ppo.rollout_epochs=2",
    "ppo.eval_every_steps=4",
    "quark.reference_steps=1",
    "data.held_out_prompts=16",
    "data.held_out_pairs=32",
    "evaluation.batch_size=16",
    "evaluation.num_completions=2",
    "logging.save_every_steps=2",
    "logging.samples_every_steps=2",
]


ALGORITHM_CONFIGS = sorted(
    path.stem
    for path in pathlib.Path("configs").glob("*.py")
    if path.stem in ALGORITHMS and path.stem not in ("sft", "reward_model", "ppo")
)


def run_small(workdir, *more, config="pipeline"):
    """The config with what SMALL has for its sections, and `more`."""
    spec = f"configs/{config}.py:tiny"
    sections = cli.load_config(spec, [])
    fitting = [item for item in SMALL if item.partition(".")[0] in sections]
    run_command.command(
        [f"--config={spec}", f"--workdir={workdir}", *(f"--config.{item}" for item in (*fitting, *more))]
    )


class Reads:
    """Notes which keys of which section the code asks for while it is active; check_config, which reads all, aside."""

    def __init__(self, patch):
        self.keys, self.noting = set(), True
        get, to_dict, check = ConfigDict.__getitem__, ConfigDict.to_dict, pipeline.check_config

        def noted_get(section, key):
            if self.noting:
                self.keys.add((frozenset(section.keys()), key))
            return get(section, key)

        def noted_to_dict(section, *args, **kwargs):
            whole = "stages" in section.keys()  # written to config.json
            if self.noting and not whole:
                self.keys |= {(frozenset(section.keys()), key) for key in section.keys()}
            return self.quietly(to_dict, section, *args, **kwargs)

        patch.setattr(ConfigDict, "__getitem__", noted_get)
        patch.setattr(ConfigDict, "to_dict", noted_to_dict)
        patch.setattr(pipeline, "check_config", lambda *args: self.quietly(check, *args))
        patch.setattr(cli, "override", functools.partial(self.quietly, cli.override))

    def quietly(self, function, *args, **kwargs):
        before, self.noting = self.noting, False
        try:
            return function(*args, **kwargs)
        finally:
            self.noting = before

    def unread(self, section, where="config"):
        for key, value in section.items():
            if hasattr(value, "items"):
                yield from self.unread(value, f"{where}.{key}")
            elif (frozenset(section.keys()), key) not in self.keys:
                yield f"{where}.{key}"


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """(workdir, what was read of its config)."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    with pytest.MonkeyPatch.context() as patch:
        reads = Reads(patch)
        run_small(workdir)
    return workdir, reads


@pytest.fixture(scope="module")
def finished(first_run):
    return first_run[0]


def test_every_key_of_the_config_is_read(first_run):
    config = cli.load_config("configs/pipeline.py:tiny", [])
    # These name data that replaces what the pipeline makes.
    assert set(first_run[1].unread(config)) <= {"config.data.eval_preferences", "config.data.max_bad_records"}


def role_tensors(workdir, stage):
    from safetensors.numpy import load_file

    return load_file(os.path.join(workdir, "roles", stage, "adapter_model.safetensors"))


def assert_same_policy(one, other, stage="ppo"):
    a, b = role_tensors(one, stage), role_tensors(other, stage)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def copy_without(finished, workdir, *gone):
    shutil.copytree(finished, workdir)
    for name in gone:
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return workdir


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
    sides = [
        [json.loads(line) for line in open(finished / f"eval_results_{s}.jsonl")]
        for s in ("untuned", "tuned")
    ]
    assert [row["inputs"] for row in sides[0]] == [row["inputs"] for row in sides[1]] and len(sides[0]) == 16
    assert set(sides[0][0]) == {"inputs", "prediction"}
    assert set(sides[0][0]["inputs"]) == {"inputs_pretokenized", "targets_pretokenized"}


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


def stop_after_each_step(monkeypatch):
    """Every run of an online stage is stopped by a signal during its first step."""
    real = online.train

    def stopping(*args, **kwargs):
        step_fn = args[2]

        def step(state, position):
            kwargs["stop"].requested = True
            return step_fn(state, position)

        return real(args[0], args[1], step, **kwargs)

    monkeypatch.setattr(online, "train", stopping)


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


def timeless(workdir, stage):
    """The metrics of a stage without what depends on the clock."""
    rows = [m for m in read_metrics(workdir / "metrics.jsonl") if m["stage"] == stage]
    return [{name: value for name, value in m.items() if name not in CLOCK} for m in rows]


CLOCK = ("time", "step_seconds", "tokens_per_second")


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
    with pytest.raises(NumericsError, match="rewards were NaN"):
        run_small(workdir)
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


def test_config_files_load_at_every_size_and_pass_the_checks():
    from rlhf_jax.training.checks import check_config

    for name in ("sft", "reward_model", "ppo", "pipeline", "best_of_n", *ALGORITHM_CONFIGS):
        for size in ("tiny", "smollm2", "llama2_7b", "llama2_13b", "llama2_70b"):
            config = cli.load_config(f"configs/{name}.py:{size}", [])
            check_config(config, tuple(pipeline.STAGES))


@pytest.mark.parametrize("value", ["own", "reward"])
def test_a_value_network_of_its_own(finished, tmp_path, value):
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


@pytest.mark.parametrize("name", ALGORITHM_CONFIGS)
def test_every_algorithm_runs_from_its_config(finished, tmp_path, monkeypatch, name):
    """Two steps after the SFT, preferences and reward model of the finished run, then evaluation and report."""
    workdir = tmp_path / name
    workdir.mkdir()
    for part in ("base", "roles/sft", "roles/reward_model"):
        shutil.copytree(finished / part, workdir / part)
    for part in ("preferences.jsonl", "preferences_held_out.jsonl"):
        shutil.copy(finished / part, workdir)
    reads = Reads(monkeypatch)
    run_small(workdir, f"{name}.steps=2", f"{name}.batch_size=16", config=name)
    rows = [m for m in read_metrics(workdir / "metrics.jsonl") if m["stage"] == name]
    assert [m["step"] for m in rows] == [1, 2] and all(math.isfinite(m["loss"]) for m in rows)
    assert rows[0]["skipped_updates"] == 0 and rows[1]["grad_norm"] > 0
    if ALGORITHMS[name].online:
        assert abs(rows[0]["kl"]) < 1e-4 < abs(rows[1]["kl"])  # the policy starts as the reference, and moves
        assert max(m.get("first_ratio_gap", 0.0) for m in rows) < 1e-3
    else:
        assert "eval/accuracy" in rows[1]
    assert (workdir / "report.html").exists() and (workdir / "roles" / name).exists()
    section = cli.load_config(f"configs/{name}.py:tiny", [])[name]
    assert set(reads.unread(section, name)) == set()


def test_groups_that_are_replaced_are_the_same_when_resumed(finished, tmp_path, monkeypatch):
    """Dynamic sampling draws prompts and keys by position; the texts written down are those trained on."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = ("grpo.steps=2", "grpo.batch_size=16", "grpo.num_completions=2", "grpo.max_refills=2",
               "grpo.rollout_epochs=1", "rewards.components=('sentiment',)", "stages=('sft','grpo')")  # fmt: skip
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


def test_a_run_with_a_memory_resumes_with_the_same_bits(finished, tmp_path, monkeypatch):
    """Quark stopped after its first and second step ends as the unbroken run: the pool is part of the state. Its
    quantile's tokens are in role.json, read by evaluation and told by export."""
    workdirs = [tmp_path / name for name in ("whole", "broken")]
    settings = ("quark.steps=3", "quark.batch_size=16", "quark.train='lora'", "logging.save_every_steps=1")
    for workdir in workdirs:
        workdir.mkdir()
        for part in ("base", "roles/sft", "roles/reward_model"):
            shutil.copytree(finished / part, workdir / part)
        for part in ("preferences.jsonl", "preferences_held_out.jsonl"):
            shutil.copy(finished / part, workdir)
    run_small(workdirs[0], *settings, config="quark")
    stop_after_each_step(monkeypatch)
    for _ in range(2):
        with pytest.raises(Interrupted, match="Run the same command"):
            run_small(workdirs[1], *settings, config="quark")
    monkeypatch.undo()
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


def test_best_of_n_of_the_base_is_judged_as_a_policy(finished, tmp_path):
    workdir = tmp_path / "best"
    workdir.mkdir()
    for part in ("base", "roles/sft", "roles/reward_model"):
        shutil.copytree(finished / part, workdir / part)
    for part in ("preferences.jsonl", "preferences_held_out.jsonl"):
        shutil.copy(finished / part, workdir)
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


def test_a_policy_is_tuned_on_functions_without_a_reward_model(finished, tmp_path, monkeypatch, capsys):
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
