"""The calls as --dry_run prints them, and what is refused before any is made."""

import os
import pathlib
import subprocess
import time

import pytest

from experiments.tpu import __main__ as tpu
from experiments.tpu import source, types
from experiments.tpu.cloud import execute
from experiments.tpu.commands import Job
from rlhf_jax.errors import InputError, RunError
from tests.experiments.tpu.conftest import FLAGS, RUN

SSH = "gcloud compute tpus tpu-vm ssh run1 --zone=us-west4-a --worker=all "


def printed(capsys, action, *more, run=RUN):
    tpu.command([action, *FLAGS, "--dry_run", *more, *run])
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize(
    "action, more, calls",
    [
        ("create", [], ["gcloud compute tpus tpu-vm create run1 --zone=us-west4-a --accelerator-type=v5litepod-16 "
                        "--version=v2-alpha-tpuv5-lite"]),
        ("create", ["--spot", "--project=p", "--create_flag=--network=n"],
         ["gcloud compute tpus tpu-vm create run1 --zone=us-west4-a --project=p --accelerator-type=v5litepod-16 "
          "--version=v2-alpha-tpuv5-lite --spot --network=n"]),
        ("create", ["--queued", "--spot"],
         ["gcloud compute tpus queued-resources create run1 --zone=us-west4-a --node-id=run1 "
          "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"]),
        ("launch", [], [SSH + "'--command=bash rlhf_jax_worker.sh launch /mnt/rlhf_jax/runs/1 --distributed "
                        "--workdir=/mnt/rlhf_jax/runs/1 --config=configs/ppo.py:llama2_7b' --quiet"]),
        ("stop", [], [SSH + "'--command=if [ -e rlhf_jax_worker.sh ]; then bash rlhf_jax_worker.sh stop; fi' --quiet"]),
        ("delete", [], ["gcloud compute tpus tpu-vm delete run1 --zone=us-west4-a --quiet"]),
        ("delete", ["--queued"],
         ["gcloud compute tpus queued-resources delete run1 --zone=us-west4-a --force --quiet"]),
    ],
)  # fmt: skip
def test_the_calls_of_each_action(fake, capsys, action, more, calls):
    assert printed(capsys, action, *more) == calls
    assert fake.calls() == []


def test_set_up_copies_code_script_and_token_without_showing_it(fake, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    copy, run = printed(capsys, "setup")
    kept = tmp_path / "cache" / "rlhf_jax" / "tpu" / "run1.us-west4-a"
    assert copy == (
        f"gcloud compute tpus tpu-vm scp {kept}/rlhf_jax.tar.gz {kept}/rlhf_jax_worker.sh {kept}/.rlhf_jax_token run1: "
        "--zone=us-west4-a --worker=all --quiet"
    )
    assert run == SSH + "'--command=bash rlhf_jax_worker.sh setup b' --quiet"
    assert not kept.exists(), "a dry run writes nothing"


def test_arguments_survive_two_shells(fake, capsys, tmp_path):
    text = 'Say: it\'s "$HOME"; 100%'
    (call,) = printed(capsys, "launch", run=[*RUN, f"--config.data.instruction={text}"])
    fake.write("rlhf_jax_worker.sh", 'shift 2; printf "%s\\n" "$@"\n')
    # The shell of this machine takes the call apart, then that of the worker.
    sent = subprocess.run(
        ["/bin/bash", "-c", f"printf '%s\\n' {call}"], capture_output=True, text=True
    ).stdout
    remote = next(line for line in sent.splitlines() if line.startswith("--command=")).removeprefix(
        "--command="
    )
    got = subprocess.run(
        ["/bin/bash", "-c", remote],
        capture_output=True,
        text=True,
        cwd=fake.directory,
        env={"PATH": os.defpath},
    )
    assert got.stdout.splitlines()[-1] == f"--config.data.instruction={text}"


def test_one_host_needs_no_coordinator(fake, capsys):
    (call,) = printed(capsys, "launch", "--type=v5litepod-4", run=[*RUN, "--config.mesh.fsdp=-1"])
    assert "--distributed" not in call


def test_a_described_scenario_prints_its_sequence(fake, capsys):
    with pytest.raises(RunError, match="ended with status 2"):
        printed(capsys, "resume", "--scenario=missing,running,preempted,2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gcloud")]
    words = [
        line.split()[4] if " ssh " not in line else line.rpartition("worker.sh ")[2].split()[0]
        for line in lines
    ]
    begun = ["create", "describe", "poll;", "scp", "setup", "launch"]
    assert words == ["describe", *begun, "describe", "poll;", "log", "describe", "delete", *begun, "describe", "poll;",
                     "log"]  # fmt: skip
    assert fake.calls() == []


@pytest.mark.parametrize(
    "words, message",
    [
        (["delete", "--zone=us-west4-a"], "--name=: give the name"),
        (["delete", "--name=run1"], "--zone=: give the zone"),
        (["delete", "--name=--all", "--zone=us-west4-a"], "--name=--all"),
        (["create", "--name=run1", "--zone=us-west4-a", "--type=v9-8"], "--type=v9-8 .*--runtime_version"),
        (["create", "--name=run1", "--zone=us-west4-a", "--type=v5litepod-24"], "v5litepod-16, v5litepod-32"),
        (["launch", *FLAGS, "--bucket=gs://b", *RUN], "without gs://"),
        (["launch", *FLAGS, "--bucket=", *RUN], "all workers must see one directory"),
        (["launch", *FLAGS], "--config=FILE"),
        (["launch", *FLAGS, "--", "--config=configs/ppo.py:llama3"], "the size is 'llama3'"),
        (["launch", *FLAGS, *RUN, "--workdir=x"], "--workdir goes before"),
        (["launch", *FLAGS, *RUN, "--config.ppo.kl_coef=1"], "did you mean ppo.kl_coeff"),
        (
            ["resume", *FLAGS, "--type=v5litepod-64", *RUN, "--config.mesh.fsdp=8"],
            "fsdp 8 x tensor 1, and v5litepod-64 has 64 chips",
        ),
        (["resume", *FLAGS, "--dry_run", "--scenario=sunny", *RUN], "'sunny' is not running"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_called(fake, words, message):
    with pytest.raises(InputError, match=message):
        tpu.command(words)
    assert fake.calls() == []


def test_without_gcloud_it_says_how_to_get_it(fake):
    (fake.directory / "gcloud").unlink()
    with pytest.raises(InputError, match="gcloud is not installed.*cloud.google.com/sdk") as error:
        tpu.command(["create", *FLAGS])
    assert error.value.status == 2


def test_a_failing_call_is_shown_with_what_it_said(fake):
    fake.write("events", "MISSING")
    fake.write("refuse_create", "PERMISSION_DENIED: tpu.nodes.create")
    with pytest.raises(
        RunError, match="(?s)status 1:\n  gcloud compute tpus tpu-vm create run1 .*PERMISSION_DENIED"
    ):
        tpu.command(["create", *FLAGS])


def test_a_call_that_does_not_answer_is_ended_with_all_it_started(fake):
    (fake.directory / "gcloud").write_text("#!/bin/bash\n/bin/sleep 60 &\necho $! >${0%/*}/child\nwait\n")
    began = time.monotonic()
    result = execute(["gcloud", "x"], timeout_seconds=1)
    assert result.status == 255 and "no answer" in result.err and time.monotonic() - began < 20
    child = int((fake.directory / "child").read_text())
    for _ in range(200):  # until its new parent has taken note
        try:
            state = pathlib.Path(f"/proc/{child}/stat").read_text().split()[2]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    pytest.fail("it is still there")


def git(root, *words):
    me = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(root), *me, *words], check=True, capture_output=True)


def test_the_code_is_what_git_knows_and_a_changed_tree_is_refused(tmp_path, monkeypatch):
    import tarfile

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "tree"
    root.mkdir()
    (root / "code.py").write_text("old")
    (root / ".gitignore").write_text("runs/\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    bundle = source.Bundle(Job("run1", "zone"), root)
    assert bundle.kept() is None
    commit = bundle.pack(allow_dirty=False)
    assert len(commit) == 40 and bundle.kept() == commit
    (root / "code.py").write_text("new")
    (root / "more.py").write_text("x")
    (root / "runs").mkdir()
    (root / "runs" / "secret").write_text("x")
    with pytest.raises(InputError, match="code.py and 1 more.*--allow_dirty"):
        bundle.pack(allow_dirty=False)
    assert bundle.pack(allow_dirty=True) == f"{commit} with changes"
    with tarfile.open(bundle.code) as archive:
        assert sorted(archive.getnames()) == [".gitignore", "code.py", "more.py"]
        assert archive.extractfile("code.py").read() == b"new"


def test_the_token_is_a_private_file_while_it_is_copied_and_gone_after(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    bundle = source.Bundle(Job("run1", "zone"))
    bundle.directory.mkdir(parents=True)
    path = bundle.files[-1]
    with pytest.raises(RuntimeError), bundle.with_token():
        assert open(path).read() == "hf_canary" and os.stat(path).st_mode & 0o777 == 0o600
        raise RuntimeError
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    "name, chips, hosts, topology, version",
    [
        ("v4-8", 4, 1, "2x2x1", "tpu-ubuntu2204-base"),
        ("v4-32", 16, 4, "2x2x4", "tpu-ubuntu2204-base"),
        ("v5litepod-8", 8, 1, "2x4", "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", 16, 4, "4x4", "v2-alpha-tpuv5-lite"),
        ("v5litepod-64", 64, 16, "8x8", "v2-alpha-tpuv5-lite"),
        ("v5p-128", 64, 16, "4x4x4", "v2-alpha-tpuv5"),
        ("v5p-512", 256, 64, "4x8x8", "v2-alpha-tpuv5"),
        ("v5p-384", 192, 48, None, "v2-alpha-tpuv5"),
        ("v6e-1", 1, 1, "1x1", "v2-alpha-tpuv6e"),
        ("v6e-16", 16, 4, "4x4", "v2-alpha-tpuv6e"),
        ("v6e-256", 256, 64, "16x16", "v2-alpha-tpuv6e"),
    ],
)
def test_what_a_name_says(name, chips, hosts, topology, version):
    assert types.find(name) == types.Slice(name, version, chips, hosts, topology)


@pytest.mark.parametrize(
    "name", ["v4-4", "v4-33", "v5p-24", "v5litepod-2", "v6e-512", "v4-0", "v4", "v4-32x", ""]
)
def test_names_that_are_none(name):
    with pytest.raises(InputError, match=f"--type={name}"):
        types.find(name)


def test_an_unknown_type_goes_through_with_its_runtime_version():
    assert types.find("v7x-8", "some-image") == types.Slice("v7x-8", "some-image")
    assert types.find("v4-32", "other").runtime_version == "other"
