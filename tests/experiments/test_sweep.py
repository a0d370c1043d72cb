"""Sweeps: what is refused before anything runs, what is run and in which order, and one real one end to end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import cli, points, sweep
from experiments.processes import Processes, last_error
from rlhf_jax.errors import InputError

SMALL = ["sft.steps=8", "ppo.steps=4", "ppo.batch_size=16", "data.held_out_prompts=16", "evaluation.batch_size=16",
         "evaluation.num_completions=2"]  # fmt: skip


def written(tmp_path, body):
    """A sweep config with get_config returning sweep(BODY)."""
    path = tmp_path / "mine.py"
    path.write_text(
        f"from configs.sweeps import grid, sweep\ndef get_config(size='tiny'):\n    return sweep(size, {body})\n"
    )
    return str(path)


TWO = "points=('ppo.kl_coeff=0.1', 'ppo.kl_coeff=0.2'), seeds=(0, 1)"


@pytest.mark.parametrize("name", ["kl_coeff", "losses", "kl_estimator", "lora_rank"])
@pytest.mark.parametrize("size", ["tiny", "smollm2", "llama2_7b"])
def test_every_sweep_loads_and_its_points_pass_the_checks(name, size):
    plan = points.load(f"configs/sweeps/{name}.py:{size}", [])
    assert 3 <= len(plan.points) <= 5 and 2 <= len(plan.seeds) <= 3
    for point in plan.points:
        assert point.config(1).stages[-1] == "evaluation" and point.config(1).seed == 1
    shared = plan.shared.config(2)
    assert shared.stages[-2:] == ("reward_model", "gate") and ("sft" in shared.stages) == (size == "tiny")


def test_a_grid_is_every_combination():
    from configs.sweeps import grid

    assert grid({"a.b": (1, 2), "c": ("x", "y")}) == (("a.b=1", "c=x"), ("a.b=1", "c=y"),
                                                     ("a.b=2", "c=x"), ("a.b=2", "c=y"))  # fmt: skip


@pytest.mark.parametrize(
    "body, message",
    [
        ("points=()", "mine.py: points is .*at least one"),
        ("points=('ppo.kl_coef=0.1',)", r"mine.py: point kl_coef=0.1 .*did you mean ppo.kl_coeff\?"),
        ("points=('ppo.kl_coeff=-1',)", "mine.py: point kl_coeff=-1 .*expected 0 or more"),
        ("points=('ppo.steps=4', 'sft.steps=4')", "two points are named steps=4"),
        ("points=(dict(name='a/b'),)", "to be a directory"),
        ("points=(dict(nmae='a'),)", "a dict of name, config, overrides"),
        ("points=('ppo.steps',)", "expected KEY=VALUE"),
        ("points=('seed=3',)", "use its key seeds"),
        ("points=('ppo.steps=4',), seeds=(1, 1)", "different whole numbers"),
        ("points=('ppo.steps=4',), base='configs/nope.py'", "mine.py: .*configs/nope.py does not exist"),
        ("points=(dict(config='configs/nope.py'),)", "mine.py: point nope .*does not exist"),
        ("points=('sft.steps=4',)", "sft.steps, which the shared stages sft, preferences, reward_model, gate read"),
        ("points=('reward_model.kind=ranking',), shared=('sft', 'preferences')", "changes reward_model.kind, which"),
        ("points=('ppo.steps=4',), shared=('ppo',)", "expected some of sft, preferences, reward_model, gate"),
        ("points=('ppo.steps=4',), overrides=('pp.steps=4',)", r"no such key; did you mean ppo.steps\?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_runs(tmp_path, body, message):
    with pytest.raises(InputError, match=message):
        points.load(written(tmp_path, body), [])


def test_overrides_of_the_command_line_are_the_sweeps_or_those_of_the_points_that_have_the_section(tmp_path):
    file = written(tmp_path, "points=(dict(name='ppo'), dict(config='configs/dpo.py'))")
    plan = points.load(file, ["seeds=4", "ppo.steps=3", "preferences.num_pairs=64"])
    assert plan.seeds == (4,) and [point.name for point in plan.points] == ["ppo", "dpo"]
    ppo, dpo = (point.config(4) for point in plan.points)
    assert ppo.ppo.steps == 3 and dpo.preferences.num_pairs == ppo.preferences.num_pairs == 64
    assert plan.shared.config(4).preferences.num_pairs == 64
    with pytest.raises(InputError, match="did you mean ppo.steps"):
        points.load(file, ["ppo.step=3"])


class Fake:
    """In the place of experiments.run: notes what it is asked for and leaves evaluation.json, or fails."""

    def __init__(self, monkeypatch, fails=()):
        self.asked, self.fails, self.stop_after = [], dict(fails), None
        done = lambda config, directory: os.path.exists(os.path.join(directory, "evaluation.json"))
        monkeypatch.setattr(sweep, "is_done", done)

    def __call__(self, arguments, log):
        workdir = next(a.removeprefix("--workdir=") for a in arguments if a.startswith("--workdir="))
        name = "/".join(workdir.split(os.sep)[-2:])
        self.asked.append(name)
        os.makedirs(os.path.join(workdir, "roles", "sft"), exist_ok=True)
        for file in ("config.json", os.path.join("roles", "sft", "config.json")):
            if not os.path.exists(os.path.join(workdir, file)):
                open(os.path.join(workdir, file), "w").write(name)
        if name in self.fails:
            return self.fails[name], f"error: {name} went wrong"
        if not name.startswith("shared"):
            open(os.path.join(workdir, "evaluation.json"), "w").write("{}")
        return 0, ""

    def stopped(self):
        return self.stop_after is not None and len(self.asked) >= self.stop_after

    def sweep(self, plan, workdir):
        return [
            (r.point, r.seed, r.status) for r in sweep.run_all(plan, str(workdir), self, self.stopped, print)
        ]


A, B = "kl_coeff=0.1", "kl_coeff=0.2"


def test_a_failed_point_does_not_end_the_sweep_and_is_tried_again(tmp_path, monkeypatch):
    plan = points.load(written(tmp_path, TWO), [])
    fake = Fake(monkeypatch, {f"{A}/seed0": 137})
    assert fake.sweep(plan, tmp_path) == [(A, 0, 137), (A, 1, 0), (B, 0, 0), (B, 1, 0)]
    assert fake.asked == [
        "shared/seed0",
        f"{A}/seed0",
        f"{B}/seed0",
        "shared/seed1",
        f"{A}/seed1",
        f"{B}/seed1",
    ]
    again = Fake(monkeypatch)
    assert again.sweep(plan, tmp_path) == [(A, 0, 0), (A, 1, 0), (B, 0, 0), (B, 1, 0)]
    assert again.asked == [f"{A}/seed0"]
    copied = tmp_path / "points" / B / "seed1"
    assert (copied / "roles/sft/config.json").read_text() == "shared/seed1"
    assert (copied / "config.json").read_text() == f"{B}/seed1"  # the one of the shared run is left behind


def test_failed_shared_stages_fail_the_points_of_their_seed_only(tmp_path, monkeypatch):
    plan = points.load(written(tmp_path, TWO), [])
    fake = Fake(monkeypatch, {"shared/seed0": 3})
    assert fake.sweep(plan, tmp_path) == [(A, 0, 3), (A, 1, 0), (B, 0, 3), (B, 1, 0)]
    assert fake.asked.count("shared/seed0") == 1 and not (tmp_path / "points" / A / "seed0").exists()


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_sweep_starts_nothing_more_and_goes_on_where_it_was(tmp_path, monkeypatch, after):
    plan = points.load(written(tmp_path, TWO), [])
    fake = Fake(monkeypatch)
    fake.stop_after = after
    assert fake.sweep(plan, tmp_path) == [
        (A, 0, 0 if after == 2 else None),
        (A, 1, None),
        (B, 0, None),
        (B, 1, None),
    ]
    assert len(fake.asked) == after
    assert {status for _, _, status in Fake(monkeypatch).sweep(plan, tmp_path)} == {0}


@pytest.mark.parametrize("status", [137, 3])
def test_the_sweep_ends_with_the_status_of_the_first_failed_point(tmp_path, monkeypatch, status, capsys):
    fake = Fake(monkeypatch, {f"{B}/seed0": status})
    monkeypatch.setattr(Processes, "run", lambda self, arguments, log: fake(arguments, log))
    with pytest.raises(SystemExit) as exit:
        cli.main(sweep.command, [f"--config={written(tmp_path, TWO)}", f"--workdir={tmp_path / 'out'}"])
    assert exit.value.code == status
    printed = capsys.readouterr()
    assert "1 of 4 runs failed" in printed.err and f"{B}/seed0 went wrong" in printed.out
    saved = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [run["status"] for run in saved["runs"]] == [0, 0, status, 0]


def test_what_a_command_said_last(tmp_path, monkeypatch):
    assert last_error("noise\nerror: this is wrong\n  and where\n\n") == "error: this is wrong"
    assert last_error("Traceback\nValueError: no\n-----\nFor simplicity, ...\n") == "ValueError: no"
    assert last_error("Aborted\n") == "Aborted" and last_error("") == ""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho started\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with Processes() as processes:
        status, said = processes.run([], str(tmp_path / "log"))
    assert (status, said) == (137, "out of memory? killed by signal 9") and not processes.stopped
    assert (tmp_path / "log.log").read_text() == "started\n"


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_goes_to_the_command_that_runs(tmp_path, monkeypatch, which):
    script = tmp_path / "python"
    script.write_text(
        f"#!/bin/sh\ntrap 'exit 75' TERM\nkill -{which.value} {os.getpid()}\nwhile :; do sleep 0.05; done\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    outer = signal.signal(which, signal.default_int_handler)  # tests started in the background ignore SIGINT
    try:
        with Processes() as processes:
            assert processes.run([], str(tmp_path / "log"))[0] == 75
            assert processes.stopped
        assert signal.getsignal(which) is signal.default_int_handler
    finally:
        signal.signal(which, outer)


@pytest.mark.slow
def test_a_real_sweep(tmp_path):
    """Two points and one seed: every file is there; run again, it runs nothing. On a rule, which is quick to start."""
    (tmp_path / "base.py").write_text(
        "from configs import pipeline\ndef get_config(size):\n    config = pipeline.get_config(size)\n"
        "    config.stages = ('sft', 'ppo', 'evaluation')\n    config.rewards.components = ('length:target=8',)\n"
        "    return config\n"
    )
    file = written(tmp_path, f"{TWO}, shared=('sft',), base='{tmp_path / 'base.py'}'")
    command = [sys.executable, "-m", "experiments.sweep", f"--config={file}", f"--workdir={tmp_path / 'out'}"]
    command += ["--config.seeds=0", *(f"--config.{text}" for text in SMALL)]
    one_device = " ".join(f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f)
    first = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": one_device}
    )
    assert first.returncode == 0, first.stderr + first.stdout
    for name in ("sweep.json", "sweep.md", "sweep.html", "sweep.png", f"points/{A}/seed0/report.html"):
        assert (tmp_path / "out" / name).exists(), name
    saved = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert saved["equal_kl"] > 0
    assert all({"kl", "reward", "gold_reward_change", "gold_reward_at_kl"} <= set(p) for p in saved["points"])
    one, other = (tmp_path / "out" / "points" / name / "seed0/roles/sft/model.safetensors" for name in (A, B))
    assert one.read_bytes() == other.read_bytes()
    began = time.monotonic()
    again = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": one_device}
    )
    assert again.returncode == 0 and again.stdout.count("already done") == 2 and time.monotonic() - began < 30
    assert "shared stages" not in again.stdout
