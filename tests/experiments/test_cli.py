"""Flags, overrides and messages: nothing is ignored, every error names the key and what to do."""

import subprocess
import sys
import time

import pytest

from experiments import cli
from experiments import run as run_command
from rlhf_jax.errors import InputError

CONFIG = "configs/ppo.py:tiny"


@pytest.mark.parametrize(
    "override, message",
    [
        ("ppo.kl_coef=0.1", r"no such key; did you mean ppo.kl_coeff\?"),
        ("ppo.kl_coeff=high", "'high' is not a float"),
        ("ppo.steps=1.5", "'1.5' is not a int"),
        ("ppo.kl_coeff=nan", "is not a float"),
        ("ppo.kl_coeff=1e999", "not a finite number"),
        ("model.path.x=1", "no such key"),
        ("ppo.whiten_rewards=3", "'3' is not a bool"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(InputError, match=message):
        cli.load_config(CONFIG, [override])


@pytest.mark.parametrize(
    "override, value",
    [
        ("ppo.kl_coeff=1", 1.0),
        ("ppo.steps=7", 7),
        ("ppo.whiten_rewards=true", True),
        ("model.path=org/name", "org/name"),
        ("data.instruction=Say: a=b", "Say: a=b"),
        ("stages=sft,ppo", ("sft", "ppo")),
        ("stages=('ppo',)", ("ppo",)),
    ],
)
def test_overrides_take_the_type_of_the_key(override, value):
    config = cli.load_config(CONFIG, [override])
    for name in override.partition("=")[0].split("."):
        config = config[name]
    assert config == value and type(config) is type(value)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["ppo.clip_epsilon=0.0"], "config.ppo.clip_epsilon is 0.0; expected a number above 0"),
        (["ppo.gamma=1.5"], "between 0 and 1"),
        (["ppo.kl_kind=k9"], "expected one of k1, k2, k3"),
        (["ppo.batch_size=30", "ppo.num_minibatches=4"], "multiple of 4"),
        (["stages=ppoo"], r"config.stages is \('ppoo',\)"),
        (["data.preferences=x.jsonl"], "leave one of them out"),
        (["lora.targets=q_prj"], "LoRA targets"),
        (["mesh.data=3"], "product is the number of devices"),
    ],
)
def test_values_are_checked_before_anything_runs(overrides, message, tmp_path):
    arguments = [f"--config={CONFIG}", f"--workdir={tmp_path}", *(f"--config.{o}" for o in overrides)]
    with pytest.raises(InputError, match=message):
        run_command.command(arguments)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("argv", [["steps=3"], ["--steps=3"], ["--config.ppo.steps"]])
def test_stray_arguments_are_errors(argv, tmp_path):
    with pytest.raises(InputError):
        run_command.command([f"--config={CONFIG}", f"--workdir={tmp_path}", *argv])


def test_unknown_size_and_missing_file():
    with pytest.raises(InputError, match="expected one of tiny, smollm2"):
        cli.load_config("configs/ppo.py:huge", [])
    with pytest.raises(InputError, match="does not exist"):
        cli.load_config("configs/nothing.py", [])


def test_an_error_is_one_line_and_status_2_and_help_is_quick():
    command = [sys.executable, "-m", "experiments.run"]
    failed = subprocess.run(
        [*command, f"--config={CONFIG}", "--workdir=/nonexistent/x", "--config.ppo.stepz=1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 2
    assert failed.stderr.strip() == "error: --config.ppo.stepz: no such key; did you mean ppo.steps?"
    began = time.monotonic()
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--workdir" in shown.stdout
    assert time.monotonic() - began < 10  # about one second; a loaded machine is slower
