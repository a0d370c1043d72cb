"""Real processes, really killed: what is on disk afterwards must be enough to end with the same bits."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.experiments.small_runs import (
    assert_same_policy,
    begun,
    overrides,
    run_small,
    timeless,
    without_clock,
)

SMALL = [
    "--config=configs/pipeline.py:tiny",
    "--config.sft.steps=6",
    "--config.preferences.num_pairs=64",
    "--config.preferences.batch_size=16",
    "--config.reward_model.steps=6",
    "--config.ppo.steps=6",
    "--config.ppo.batch_size=16",
    "--config.data.held_out_prompts=16",
    "--config.data.held_out_pairs=16",
    "--config.evaluation.batch_size=16",
    "--config.evaluation.num_completions=1",
    "--config.logging.log_every_steps=1",
    "--config.logging.save_every_steps=1",
]


# Eight devices are slower to start.
ONE_DEVICE = re.sub(r"device_count=\d+", "device_count=1", os.environ["XLA_FLAGS"])


def start(workdir, flags=SMALL, xla_flags=ONE_DEVICE):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", f"--workdir={workdir}", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": xla_flags},
    )  # fmt: skip


def finish(workdir):
    process = start(workdir)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(workdir of a run that nobody touched, how many lines it printed)."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    return workdir, len(finish(workdir).splitlines())


def assert_same(one, other):
    from safetensors.numpy import load_file

    for stage in ("reward_model", "ppo"):
        a, b = (load_file(run / "roles" / stage / "adapter_model.safetensors") for run in (one, other))
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"{stage} {name}")
    rows = [[json.loads(line) for line in open(run / "metrics.jsonl")] for run in (one, other)]
    plain = [[without_clock(row) for row in side] for side in rows]
    assert plain[0] == plain[1]
    assert same_text("eval_results_tuned.jsonl", one, other)


def same_text(name, one, other):
    return (one / name).read_text() == (other / name).read_text()


def kill_and_resume(kills, unbroken, tmp_path, seed):
    """Kill at random points - a while after a random line of output - and start again, until the run is through."""
    (reference, lines), dice = unbroken, random.Random(seed)
    killed, workdirs = 0, [tmp_path / "0"]
    while killed < kills:
        process = start(workdirs[-1])
        for _ in zip(range(dice.randrange(lines)), process.stdout, strict=False):
            pass
        time.sleep(dice.random())
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        else:  # it got through first: another one
            workdirs.append(tmp_path / str(len(workdirs)))
        process.communicate()
    for workdir in workdirs:
        finish(workdir)
        assert_same(reference, workdir)


@pytest.mark.faults
def test_ten_sigkills_change_no_bit(unbroken, tmp_path):
    kill_and_resume(10, unbroken, tmp_path, seed=1)


def test_sigterm_saves_and_says_how_to_go_on(finished, tmp_path, capsys):
    """A process that tunes the policy of a finished run, on as many devices, so that their programs are at hand."""
    workdir = begun(finished, tmp_path / "run")
    more = ("logging.log_every_steps=1", "logging.save_every_steps=1")
    process = start(workdir, overrides("pipeline", *more), os.environ["XLA_FLAGS"])
    for line in process.stdout:
        if line.startswith("ppo 1/"):
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert errors.strip().count("\n") == 0 and "Run the same command" in errors, errors
    run_small(workdir, *more)
    assert "resuming from step" in capsys.readouterr().out
    assert_same_policy(finished, workdir)
    assert timeless(finished, "ppo") == timeless(workdir, "ppo")
    assert same_text("eval_results_tuned.jsonl", finished, workdir)
    run_small(workdir, *more)
    assert "are done" in capsys.readouterr().out
