"""A run of two processes is the run of one; and when one of them ends, however it ends, both do, and it can go on."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest

from experiments import run as run_command
from rlhf_jax.training.metrics import read_metrics
from tests.experiments.small_runs import (
    SMALL,
    assert_same_policy,
    begun,
    copy_without,
    overrides,
    run_small,
    timeless,
)
from tests.pairs import Pair

RUN = ("-m", "experiments.run")
FLAGS = ["--config=configs/pipeline.py:tiny", "--config.logging.log_every_steps=1"]
FLAGS += [f"--config.{item}" for item in SMALL if not item.startswith("quark.")]
SOON = 30  # seconds in which the other process ends


def pair(workdir, *more, program=RUN, **options):
    return Pair(f"{workdir}.logs", *program, f"--workdir={workdir}", *FLAGS, *more, **options)


def lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def assert_close(one, other):
    """Metrics to 1e-5, of the larger of their value and 1: means of rewards lie around 0."""
    assert len(one) == len(other) > 0
    for row, same in zip(one, other, strict=True):
        assert row.keys() == same.keys()
        for name, value in row.items():
            if isinstance(value, float):
                np.testing.assert_allclose(value, same[name], rtol=1e-5, atol=1e-5, err_msg=name)
            else:
                assert value == same[name], name


def texts(path):
    return [(row["step"], row["prompt"], row["completion"]) for row in lines(path)]


def test_two_processes_make_the_run_of_one(finished, tmp_path):
    """PPO and the evaluation, on the same eight devices, four in each process."""
    workdir = begun(finished, tmp_path / "run")
    with pair(workdir) as run:
        assert run.statuses() == [0, 0], run.log(0) + run.log(1)
        assert run.log(1) == ""  # only the first one speaks
    assert_close(timeless(workdir, "ppo"), timeless(finished, "ppo"))
    assert texts(workdir / "completions/ppo.jsonl") == texts(finished / "completions/ppo.jsonl")
    for name in ("eval_results_untuned.jsonl", "eval_results_tuned.jsonl"):
        assert (workdir / name).read_text() == (finished / name).read_text()
    files = lambda run: {str(path.relative_to(run)) for path in run.rglob("*.json*")}
    left_out = ("checkpoints/", "reward_model.json", "reference/")
    compared = [{name for name in files(run) if not name.startswith(left_out)} for run in (workdir, finished)]
    assert (
        compared[0] == compared[1] - {"completions/sft.jsonl", "completions/reward_model.jsonl"} | compared[0]
    )
    assert json.loads((workdir / "environment.json").read_text())["processes"] == 2


@pytest.mark.faults
def test_a_config_of_its_own_is_refused(finished, tmp_path):
    workdir = begun(finished, tmp_path / "run")
    with pair(workdir, own=((), ("--config.ppo.kl_coeff=0.07",))) as run:
        assert run.statuses(100) == [2, 2]
        for n in (0, 1):
            assert "config.ppo.kl_coeff: 0.05 on process 0; 0.07 on process 1" in run.log(n), run.log(n)
    assert not (workdir / "config.json").exists() and not (workdir / "metrics.jsonl").exists()


@pytest.mark.faults
def test_data_of_its_own_is_refused(finished, tmp_path):
    workdir = begun(finished, tmp_path / "run")
    for n in (0, 1):  # a path means another file on each host
        os.makedirs(tmp_path / f"host{n}")
        rows = [{"input_text": f"Prompt number {i + n * (i == 7)}"} for i in range(64)]
        (tmp_path / f"host{n}/p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = f"--config={os.getcwd()}/configs/pipeline.py:tiny"
    cwd = [tmp_path / f"host{n}" for n in (0, 1)]
    with pair(workdir, spec, "--config.data.prompts=p.jsonl", cwd=cwd) as run:
        assert run.statuses(100) == [2, 2]
        assert "train prompts: [" in run.log(0) and "on process 1" in run.log(0), run.log(0)


@pytest.fixture(scope="module")
def uninterrupted(finished, tmp_path_factory):
    workdir = begun(finished, tmp_path_factory.mktemp("two") / "run")
    with pair(workdir) as run:
        assert run.statuses() == [0, 0], run.log(0) + run.log(1)
    return workdir


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed_and_the_run_goes_on(victim, finished, uninterrupted, tmp_path):
    workdir = begun(finished, tmp_path / "run")
    with pair(workdir) as run:
        run.wait_for("ppo 3/")
        run.send(victim)
        began = time.monotonic()
        statuses = run.statuses(SOON)
        assert time.monotonic() - began < SOON
        assert statuses[victim] == -signal.SIGKILL
        assert statuses[1 - victim] in (76, -signal.SIGABRT)  # jax may be faster to notice
        if statuses[1 - victim] == 76:
            assert f"error: process {victim} of 2 is gone" in run.log(1 - victim)
    with pair(workdir) as run:
        assert run.statuses() == [0, 0], run.log(0) + run.log(1)
        assert "ppo: resuming from step 2" in run.log(0)
    assert_same_policy(uninterrupted, workdir)
    assert timeless(uninterrupted, "ppo") == timeless(workdir, "ppo")


@pytest.mark.faults
def test_a_run_of_one_is_taken_up_by_two(finished, tmp_path):
    workdir = copy_without(
        finished, tmp_path / "run", "checkpoints/ppo/4", "roles/ppo", "report.html", "evaluation.json"
    )
    with pair(workdir) as run:
        assert run.statuses() == [0, 0], run.log(0) + run.log(1)
        assert "ppo: resuming from step 2" in run.log(0)
    assert_close(timeless(workdir, "ppo"), timeless(finished, "ppo"))
    assert texts(workdir / "completions/ppo.jsonl") == texts(finished / "completions/ppo.jsonl")


@pytest.mark.faults
def test_rewards_are_normalised_over_all_processes(finished, tmp_path):
    """Of a mixture of the learned reward and a rule, which each process asks about its own rows."""
    more = ["rewards.components=('learned','length:target=5')", "rewards.weights=(1.0,0.5)"]
    more += ["rewards.normalise=batch", "stages=('ppo',)", "ppo.steps=3"]
    one, two = (begun(finished, tmp_path / name) for name in ("one", "two"))
    run_small(one, *more)
    with pair(two, *(f"--config.{item}" for item in more)) as run:
        assert run.statuses() == [0, 0], run.log(0) + run.log(1)
    assert_close(timeless(two, "ppo"), timeless(one, "ppo"))
    assert texts(two / "completions/ppo.jsonl") == texts(one / "completions/ppo.jsonl")


SHORT = ("preferences.num_pairs=32", "reward_model.steps=2", "ppo.steps=2", "ppo.eval_every_steps=0")
CASES = {  # config, what it changes, what it makes again
    "grpo": (
        "grpo",
        ("stages=('grpo',)", "grpo.steps=2", "grpo.batch_size=8", "grpo.pack_completions=True"),
        (),
    ),
    "raft": ("raft", ("stages=('raft',)", "raft.steps=2"), ()),
    # With the rate of the config, AdamW makes enough of a sum's rounding for another token to be drawn.
    "quark": ("quark", ("stages=('quark',)", "quark.steps=2", "quark.optimizer.learning_rate=1e-4"), ()),
    "dpo": ("dpo", ("stages=('dpo',)", "dpo.steps=2", "data.length_buckets=4", "data.sort_batches=2"), ()),
    "encoder": (
        "reward_models/encoder",
        ("stages=('reward_model','ppo')", *SHORT),
        ("roles/reward_model", "gate.json"),
    ),
    "pairrm": (
        "reward_models/pairrm",
        ("stages=('reward_model',)", *SHORT[:2]),
        ("roles/reward_model", "gate.json"),
    ),
    "constitution": ("constitutional", ("stages=('constitution',)", "constitution.num_prompts=16"), ()),
    "judge": (
        "constitutional",
        ("stages=('preferences',)", "preferences.labeller=judge:path={base}", SHORT[0]),
        ("preferences.jsonl", "preferences_held_out.jsonl"),
    ),
}


@pytest.mark.faults
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_stage_is_the_same_in_two(case, finished, tmp_path):
    config, changes, made_again = CASES[case]
    changes = [change.format(base=finished / "base") for change in changes]
    one, two = (begun(finished, tmp_path / name) for name in ("one", "two"))
    for path in (run / name for run in (one, two) for name in made_again):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    flags = overrides(config, "logging.log_every_steps=1", *changes)
    run_command.command([*flags, f"--workdir={one}"])
    with Pair(f"{two}.logs", *RUN, f"--workdir={two}", *flags) as run:
        assert run.statuses() == [0, 0], run.log(0) + run.log(1)
    stages = {row["stage"] for row in read_metrics(one / "metrics.jsonl")} if case != "judge" else ()
    for stage in stages:
        assert_close(timeless(two, stage), timeless(one, stage))
    files = lambda run: (*run.glob("[cp]*.jsonl"), *run.glob("completions/*.jsonl"))
    written, other = ({path.relative_to(run) for path in files(run)} for run in (one, two))
    assert written == other
    for path in written:
        found, expected = lines(two / path), lines(one / path)
        if found or expected:  # a stage that samples nothing leaves an empty one
            assert_close(found, expected)


@pytest.mark.faults
def test_a_signal_to_one_stops_both_at_one_step(finished, tmp_path):
    workdir = begun(finished, tmp_path / "run")
    with pair(workdir, "--config.ppo.steps=200", "--config.logging.save_every_steps=50") as run:
        run.wait_for("ppo 3/")
        run.send(1, signal.SIGTERM)
        assert run.statuses(60) == [75, 75]
        told = [run.log(n).strip().splitlines()[-1].partition(": interrupted")[2] for n in (0, 1)]
        assert told[0] == told[1] and "Run the same command" in told[0], told


# A program that runs the command with something that goes wrong in process 1.
BROKEN = """
import os, sys, time
import jax
from experiments import cli, run
from rlhf_jax.rewards import functions
real, calls = functions.RewardFunction.score, []
def score(self, *args):
    calls.append(1)
    if len(calls) == 3 and jax.process_index() == 1:
        {what}
    return real(self, *args)
functions.RewardFunction.score = score
cli.main(run.command, sys.argv[1:])
"""
BY_RULE = ("--config.rewards.components=('length:target=8',)", "--config.evaluation.best_of=1")


@pytest.mark.faults
@pytest.mark.parametrize(
    "what, statuses, told",
    [
        (
            "raise RuntimeError('the reward server is down')",
            (76, 1),
            "ended with status 1: RuntimeError: the reward",
        ),
        ("raise OSError('disk full')", (74, 74), "ended with status 74: disk full"),
        ("sys.exit(5)", (76, 1), "ended with status 1: SystemExit: 5"),
        ("os._exit(9)", (76, 9), "is gone: it was killed"),
    ],
)
def test_one_fails_in_a_reward_function(what, statuses, told, finished, tmp_path):
    workdir = begun(finished, tmp_path / "run")
    with pair(workdir, *BY_RULE, program=("-c", BROKEN.format(what=what))) as run:
        run.wait_for("ppo 1/")
        assert run.statuses(90) == list(statuses), run.log(0) + run.log(1)
        assert f"error: process 1 of 2 {told}" in run.log(0), run.log(0)
        assert "it was at: ppo, step" in run.log(0)


@pytest.mark.faults
def test_one_that_is_stuck_ends_the_run(finished, tmp_path):
    """It lives, and jax hears its heart beat."""
    workdir = begun(finished, tmp_path / "run")
    late = BROKEN.replace("len(calls) == 3", "len(calls) == 6").format(what="time.sleep(1e6)")
    more = ("--config.logging.watchdog_seconds=4", "--config.ppo.steps=40", "--config.ppo.eval_every_steps=0")
    with pair(workdir, *BY_RULE, *more, program=("-c", late)) as run:
        run.wait_for("ppo 1/")
        assert run.statuses(120) == [76, 76], run.log(0) + run.log(1)
        assert any("has not moved for" in run.log(n) and "Thread 0x" in run.log(n) for n in (0, 1))
        assert any("in score" in run.log(n) for n in (0, 1)) or "ended with status 76" in run.log(1)


@pytest.mark.faults
def test_one_that_is_stopped_ends_the_other(finished, tmp_path):
    workdir = begun(finished, tmp_path / "run")
    with pair(workdir, "--config.ppo.steps=200") as run:
        run.wait_for("ppo 3/")
        run.send(1, signal.SIGSTOP)
        assert run.processes[0].wait(SOON + 15) in (76, -signal.SIGABRT)
