"""A real second process, a killed holder, a child that outlives its parent, a file system without flock."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from rlhf_jax.checkpoints.lock import WorkdirLock
from rlhf_jax.errors import InputError

HOLD = r"""
import os, sys, time
from rlhf_jax.checkpoints.lock import WorkdirLock
with WorkdirLock(sys.argv[1]):
    if len(sys.argv) > 2 and os.fork() == 0:  # a worker that the kill does not reach
        os.write(1, b"forked %d\n" % os.getpid())
        time.sleep(60)
        os._exit(0)
    os.write(1, b"holding %d\n" % os.getpid())
    time.sleep(60)
"""


def start_holder(workdir, *arguments, lines=1):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir), *arguments], stdout=subprocess.PIPE, text=True
    )
    said = dict(holder.stdout.readline().split() for _ in range(lines))
    return holder, {word: int(pid) for word, pid in said.items()}


def test_second_run_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    holder, _ = start_holder(tmp_path)
    try:
        began = time.monotonic()
        with pytest.raises(InputError) as refusal, WorkdirLock(str(tmp_path)):
            pass
        assert time.monotonic() - began < 3
        for word in (str(holder.pid), socket.gethostname(), str(tmp_path), "--workdir"):
            assert word in str(refusal.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == holder.pid  # stale
    with WorkdirLock(str(tmp_path)):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_forked_child_does_not_keep_the_lock(tmp_path):
    holder, pids = start_holder(tmp_path, "fork", lines=2)
    try:
        with pytest.raises(InputError, match=str(holder.pid)), WorkdirLock(str(tmp_path)):
            pass  # the child has let go, its parent has not
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(pids["forked"], 0)  # alive
        with WorkdirLock(str(tmp_path)):
            pass
    finally:
        os.kill(pids["forked"], signal.SIGKILL)
        holder.kill()
        holder.communicate()


def test_same_process_release_and_reuse(tmp_path):
    lock = WorkdirLock(str(tmp_path / "new"))
    for _ in range(2):
        with lock:
            with pytest.raises(InputError, match=str(os.getpid())), WorkdirLock(str(tmp_path / "new")):
                pass
            assert json.loads((tmp_path / "new" / ".lock").read_text())["pid"] == os.getpid()
    with pytest.raises(KeyError), lock:
        raise KeyError
    with lock:
        pass


def test_without_flock_the_file_is_believed(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    other = os.getppid()  # some process that lives
    (tmp_path / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": other}))
    with pytest.raises(InputError, match=str(other)), WorkdirLock(str(tmp_path)):
        pass
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for stale in ({"host": socket.gethostname(), "pid": ended.pid}, {"host": "another", "pid": 1}, [1], None):
        (tmp_path / ".lock").write_text(json.dumps(stale) if stale else "torn {")
        with WorkdirLock(str(tmp_path)):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
