"""How processes find each other, what they tell each other, and what the watchdog calls stuck."""

import jax
import pytest

from rlhf_jax.errors import InputError, PeerLost
from rlhf_jax.parallel import hosts, peers
from tests.pairs import Pair

SIGNS = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    *hosts.LAUNCHERS,
    *hosts.HOSTS_OF_A_SLICE,
)


@pytest.fixture
def started(monkeypatch):
    """What jax.distributed was asked for, if it was, with an environment that says nothing."""
    calls = []
    for name in SIGNS:
        monkeypatch.delenv(name, raising=False)

    def initialize(*args, **kwargs):
        calls.append((*args, kwargs["cluster_detection_method"]))
        assert kwargs["heartbeat_timeout_seconds"] == 20 and kwargs["shutdown_timeout_seconds"] == 10

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return calls


FOUND, HERE = (None, None, None, None), ("host:1", 2, 1, "deactivate")


@pytest.mark.parametrize(
    "environment, asked, expected",
    [
        ({}, {}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, {}, None),  # a slice of one host
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
            {},
            None,
        ),  # inside of salloc or sbatch, not started by srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, {}, None),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, {}, None),
        ({}, dict(address="host:1", count=1, index=0), None),
        ({}, dict(detect=True), FOUND),
        ({"SLURM_STEP_NUM_TASKS": "2"}, {}, FOUND),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}, FOUND),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, FOUND),
        ({}, dict(address="host:1", count=2, index=1), HERE),
        (dict(zip(SIGNS, ("host:1", "2", "1"), strict=False)), {}, HERE),
        (
            dict(zip(SIGNS, ("other:1", "9", "8"), strict=False)),
            dict(address="host:1", count=2, index=1),
            HERE,
        ),
    ],
)
def test_several_processes_only_where_several_are_meant(environment, asked, expected, started, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.start(**asked)
    assert started == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(address="host:1"), "--num_processes and --process_id missing"),
        (dict(count=2, index=0), "--coordinator_address missing"),
        (dict(address="host", count=2, index=0), "expected HOST:PORT"),
        (
            dict(address="host:1", count=2, index=2),
            "--process_id=2: expected HOST:PORT, and a process from 0 to",
        ),
    ],
)
def test_half_of_the_flags_are_refused(asked, message, started):
    with pytest.raises(InputError, match=message):
        hosts.start(**asked)
    assert not started


@pytest.mark.parametrize(
    "raised, expected", [(ValueError("none."), InputError), (RuntimeError("no."), PeerLost)]
)
def test_a_failed_start_says_what_to_do(raised, expected, started, monkeypatch):
    def initialize(*args, **kwargs):
        raise raised

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(expected, match="--coordinator_address|Start all of them"):
        hosts.start(detect=True)


def test_alone_everything_is_free():
    assert hosts.is_first() and not hosts.several() and hosts.name() == ""
    assert hosts.share("x") == ["x"] and hosts.agree(3) == 3
    assert hosts.spread(3, lambda rows: list(range(3))[rows]) == [0, 1, 2]
    vote = hosts.Vote()
    assert [vote(False), vote(True)] == [False, True]  # at once


def test_two_processes(tmp_path):
    with Pair(tmp_path / "logs", "-m", "tests.parallel.in_two_processes", f"--folder={tmp_path}") as pair:
        assert pair.statuses(120) == [0, 0], pair.log(0) + pair.log(1)
        assert "all is well" in pair.log(0)


def test_the_watchdog_waits_ten_times_as_long_as_it_ever_took():
    now = [0.0]
    watch = peers.Watch(lambda: now[0])

    def beat(after, phase="step", kind="step"):
        now[0] += after
        watch.beat(phase, kind, 30.0)

    def waits():
        """Seconds until it calls this stuck."""
        before, limit = now[0], 0
        while not watch.overdue():
            limit, now[0] = limit + 1, now[0] + 1
        now[0] = before
        return limit - 1

    beat(0)
    assert waits() == 300  # the first compiles: 10 times the least
    beat(250)
    assert waits() == 300  # and what it took is no measure
    beat(2)
    assert waits() == 30  # the least
    beat(7)
    assert waits() == 70
    beat(3)
    assert waits() == 70
    beat(1, "save", "save")
    assert waits() == 300  # something else
    beat(1)
    assert waits() == 70
    now[0] += 71
    assert watch.overdue() == "step has not moved for 71 s (limit 70 s)"
    beat(0, "", "")
    now[0] += 1e6
    assert not watch.overdue()  # between loops it sleeps
