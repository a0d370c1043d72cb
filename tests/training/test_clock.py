"""The clock of a step's parts, on outputs that are ready when the test says so."""

import threading
import types

import jax.numpy as jnp
import pytest

from rlhf_jax.training import clock


@pytest.fixture
def now(monkeypatch):
    """now[0] is the time; Output(at) makes it `at` when it is waited for."""
    time = [0.0]
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(monotonic=lambda: time[0]))
    return time


class Output:
    def __init__(self, now, at, gate=None):
        self.now, self.at, self.gate = now, at, gate

    def block_until_ready(self):
        if self.gate is not None:
            assert self.gate.wait(10.0)
        self.now[0] = self.at


def test_a_part_counts_from_the_end_of_what_was_before_it(now):
    """A second step is dispatched while the first still runs; the third only when the device has long been idle."""
    gate = threading.Event()
    with clock.Clock() as ticking:
        first = ticking.begin()
        first.mark("rollout", {"ids": Output(now, 2.0, gate)})
        first.mark("update", (Output(now, 5.0), None))
        now[0] = 1.0
        second = ticking.begin()
        second.mark("rollout", Output(now, 6.0))
        gate.set()
        assert first.seconds() == {"time/rollout": 2.0, "time/update": 3.0}
        assert second.seconds() == {"time/other": 0.0, "time/rollout": 1.0}
        now[0] = 8.0
        third = ticking.begin()
        for name, at in (("rollout", 9.0), ("score", 9.5), ("rollout", 10.0), ("score", 10.25)):
            third.mark(name, Output(now, at))
        assert third.seconds() == {"time/other": 2.0, "time/rollout": 1.5, "time/score": 0.75}
        assert len(third.outputs["rollout"]) == 2
        now[0] = 13.0  # nothing to wait for: what went by since
        ticking.current.mark("evaluate")
        assert third.seconds()["time/evaluate"] == 2.75


def test_reading_a_step_does_not_wait_for_the_next(now):
    never = threading.Event()
    with clock.Clock() as ticking:
        first, second = ticking.begin(), ticking.begin()
        first.mark("update", Output(now, 1.0))
        second.mark("update", Output(now, 2.0, never))
        assert first.seconds() == {"time/update": 1.0}
        never.set()


def test_what_cannot_be_waited_for_is_left_out(now):
    """A donated array, say; the time goes to the part after it, and nothing fails."""
    donated = jnp.ones(3)
    donated.delete()
    with clock.Clock() as ticking:
        parts = ticking.begin()
        parts.mark("rollout", Output(now, 1.0))
        parts.mark("score", donated)
        parts.mark("update", Output(now, 4.0))
        assert parts.seconds() == {"time/rollout": 1.0, "time/update": 3.0}
    clock.UNTIMED.mark("score", donated)


def test_the_thread_ends_with_the_stage(now):
    with clock.Clock() as ticking:
        assert ticking._thread.is_alive() and ticking._thread.daemon
    assert not ticking._thread.is_alive()
