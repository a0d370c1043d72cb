"""The command, the calls, two shells and worker.sh together: gcloud's part is played by homes on this machine."""

import os
import pathlib
import shutil
import sys
import time

import pytest

from experiments.tpu import __main__ as tpu
from experiments.tpu import source

TOOLS = ("bash", "flock", "setsid", "git")
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)) or not (source.ROOT / ".git").exists(),
    reason="needs bash, util-linux and a git clone",
)
FLAGS = ["--name=run1", "--zone=us-west4-a", "--type=v4-16", "--allow_dirty", "--delete_after"]
CLOUD = """#!PYTHON -IS
# A slice of two workers: directories beside this file. The file `preempt`, once there, takes it away.
import os, pathlib, shutil, signal, subprocess, sys
here = pathlib.Path(__file__).resolve().parent
homes, words = [here / "w0", here / "w1"], sys.argv[1:]
there = homes[0].exists()
def seen(pid, what):
    try:
        return pathlib.Path(f"/proc/{pid}/{what}").read_text()
    except OSError:
        return ""
if "describe" in words:
    if there and (here / "preempt").exists():
        (here / "preempt").unlink()
        print("PREEMPTED")
    elif there:
        print("READY")
    else:
        sys.exit("NOT_FOUND")
elif "delete" in words:
    for home in homes:  # a machine that goes takes its processes with it
        pid = home / "rlhf_jax_job" / "pid"
        run = int(pid.read_text()) if pid.exists() else 0
        if str(home) in seen(run, "cmdline"):
            waits = int(seen(run, "stat").split()[3])
            if "rlhf_jax_worker.sh" in seen(waits, "cmdline"):
                os.kill(waits, signal.SIGKILL)
            os.killpg(run, signal.SIGKILL)
        shutil.rmtree(home)
elif "create" in words:
    for number, home in enumerate(homes):
        bin = home / ".local" / "bin"
        bin.mkdir(parents=True)
        tools = {"curl": f"echo {number}", "uv": '[ $1 = pip ] && exit; d="${@: -1}/bin"; mkdir -p "$d"; ln -s %s "$d"'
                 % (here / "python")}
        for name, body in tools.items():
            (bin / name).write_text("#!/bin/bash\\n" + body + "\\n")
            (bin / name).chmod(0o755)
elif "scp" in words:
    for word in words:
        if word.startswith("/"):
            for home in homes:
                shutil.copy(word, home)
elif "ssh" in words:
    command = next(word for word in words if word.startswith("--command=")).removeprefix("--command=")
    asked = homes[:1] if "--worker=0" in words else homes
    started = [subprocess.Popen(["bash", "-c", command], cwd=home,
                                stdout=subprocess.PIPE, text=True,
                                env={"HOME": str(home), "PATH": os.defpath}) for home in asked]
    told = [one.communicate()[0] for one in started]
    print(*told, sep="", end="")
    if "checkpoints/ppo/2" in told[0]:
        (here / "preempt").touch()
    sys.exit(next((one.returncode for one in started if one.returncode), 0))
"""
# In the place of Python and experiments.run. Attempt 1: worker 1 is killed, worker 0 would wait for it for ever.
# Attempt 2: the slice is taken away, once its checkpoint was seen. Attempt 3: done.
RUN = """#!/bin/bash
number=$(curl); echo x >>"CLOUD/attempts$number"
attempt=$(wc -l <"CLOUD/attempts$number")
echo "worker $number, attempt $attempt: $*"
workdir=${5#--workdir=}
mkdir -p "$workdir/checkpoints/ppo/$attempt/meta"; touch "$workdir/checkpoints/ppo/$attempt/meta/metadata"
[ $attempt = 1 ] && [ $number = 1 ] && kill -KILL $$
[ $attempt -lt 3 ] && for _ in {1..600}; do sleep 0.1; done
exit 0
"""


def test_a_run_survives_a_killed_process_and_a_preemption(tmp_path, monkeypatch, capsys):
    cloud = tmp_path / "cloud"
    cloud.mkdir()
    (cloud / "gcloud").write_text(CLOUD.replace("PYTHON", sys.executable, 1))
    (cloud / "python").write_text(RUN.replace("CLOUD", str(cloud)))
    for name in ("gcloud", "python"):
        (cloud / name).chmod(0o755)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, path in {
        "gcloud": cloud / "gcloud",
        "git": shutil.which("git"),
        "bash": shutil.which("bash"),
    }.items():
        (tools / name).symlink_to(path)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setattr(tpu, "sleep", lambda seconds: time.sleep(0.1))
    workdir = tmp_path / "shared" / "run"
    text = 'Say: it\'s "$HOME"'
    tpu.command(
        ["resume", *FLAGS, f"--workdir={workdir}", "--max_restarts=1", "--"]
        + ["--config=configs/ppo.py:llama2_7b", "--config.mesh.fsdp=8", f"--config.data.instruction={text}"]
    )
    said = capsys.readouterr().out
    for attempt in (1, 2, 3):
        assert f"worker 0, attempt {attempt}: -u -m experiments.run --distributed --workdir={workdir}" in said
    assert f"--config.data.instruction={text}\n" in said
    assert "worker 1 exited with status 137" in said and "the slice is PREEMPTED" in said
    assert "workers 0, 1 exited with status 0" in said
    assert "hf_canary" not in said
    assert not (cloud / "w0").exists(), "deleted after the end"
    # The second attempt's logs went with their machines.
    assert sorted(path.name.split("-")[1] for path in pathlib.Path(f"{workdir}.logs").iterdir()) >= [
        "0",
        "0",
        "1",
    ]
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not any("canary" in path.read_text(errors="replace") for path in left)
    assert not os.path.exists("/mnt/rlhf_jax")
