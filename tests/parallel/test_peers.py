"""Three processes, without jax: whatever ends one ends all, soon, with a message that names it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.pairs import ROOT

GONE = "error: process {} of 3 is gone: it was killed, or its host is"
AGAIN = "Start all of them again, with the same command"


@pytest.fixture
def ends(tmp_path):
    """ends(what) -> (statuses, standard errors, seconds since something happened); victim: who is killed."""
    processes = []

    def run(what, victim=None):
        command = [sys.executable, "-u", os.path.join(ROOT, "tests/parallel/three_peers.py")]
        for n in range(3):
            arguments = [str(n), str(tmp_path), what]
            processes.append(
                subprocess.Popen(
                    command + arguments,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"PYTHONPATH": ROOT},
                )
            )
        deadline = time.monotonic() + 30
        while not all((tmp_path / f"joined{n}").exists() for n in range(3)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        began = time.monotonic()
        if victim is not None:
            processes[victim].send_signal(signal.SIGKILL)
        said = [process.communicate(timeout=30)[1] for process in processes]
        return [process.returncode for process in processes], said, time.monotonic() - began

    yield run
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("victim", range(3))
def test_a_killed_process(victim, ends):
    statuses, said, seconds = ends("sleep", victim)
    assert statuses == [-signal.SIGKILL if n == victim else 76 for n in range(3)] and seconds < 10
    for n in {0, 1, 2} - {victim}:
        assert GONE.format(victim) in said[n] and AGAIN in said[n], said[n]


@pytest.mark.parametrize(
    "what, statuses, told",
    [
        ("raise", [76, 1, 76], "error: process 1 of 3 ended with status 1: RuntimeError: no reward"),
        ("input", [2, 2, 2], "error: process 1 of 3 ended with status 2: no such file"),
    ],
)
def test_one_that_ends_by_itself_says_why(what, statuses, told, ends):
    found, said, seconds = ends(what)
    assert found == statuses and seconds < 15
    assert told in said[0] and told in said[2] and said[1] == ""
    assert (AGAIN in said[0]) == (what == "raise")  # bad input is as bad the next time


def test_all_that_end_alike_say_nothing_of_each_other(ends):
    statuses, said, seconds = ends("interrupted")
    assert statuses == [75] * 3 and said == [""] * 3 and seconds < 4


def test_one_that_is_stuck_ends_all(ends):
    statuses, said, _ = ends("stuck")
    assert statuses == [76] * 3
    assert "error: process 1 of 3: ppo, step 3 has not moved for" in said[1] and "most recent call" in said[1]
    assert "error: process 1 of 3 ended with status 76: ppo, step 3 has not moved" in said[0] and said[2]


@pytest.mark.parametrize("what", ["part", "strangers"])
def test_a_run_that_is_through_ends_well(what, ends):
    statuses, said, _ = ends(what)
    assert statuses == [0] * 3 and said == [""] * 3
