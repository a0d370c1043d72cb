"""A cloud that is played: what --dry_run of watch and resume shows, call by call.

Events, in order, with commas between: running (a look at a run that goes on), saved (the same, with a newer
checkpoint), an exit status (all workers end with it), preempted, missing. The last is kept for ever."""

import shlex

from experiments.tpu.cloud import Result
from experiments.tpu.commands import MARK
from rlhf_jax.errors import InputError

EXAMPLE = "running,saved,preempted,running,75,saved,0"


class Scenario:
    """Takes the place of cloud.execute: says each call and answers it."""

    def __init__(self, events: str, hosts: int, say=print):
        self._events = [event.strip() for event in events.split(",")]
        for event in self._events:
            if event not in ("running", "saved", "preempted", "missing") and not event.isdigit():
                raise InputError(
                    f"--scenario: {event!r} is not running, saved, preempted, missing or an exit status."
                )
        self._hosts, self._say, self._step = hosts, say, 0
        self._node, self._workers = "there", "launched"
        if self._events[0] == "missing":
            self._node, self._workers = self._next(), "bare"

    def __call__(self, call: list[str], timeout_seconds: int = 0) -> Result:
        self._say(shlex.join(call))
        what, words = call[4], " ".join(call)
        if what == "describe":
            return self._describe(queue=call[3] == "queued-resources")
        if what in ("create", "delete"):
            self._node, self._workers = ("there", "bare") if what == "create" else ("missing", "bare")
        elif what == "ssh" and " setup" in words:
            self._workers = "idle"
        elif what == "ssh" and " launch" in words:
            self._workers = "launched"
        elif what == "ssh" and " poll" in words:
            return self._poll()
        elif what == "ssh" and " log" in words:
            return Result(0, "".join(f"{MARK} saved checkpoints/stage/{n}\n" for n in range(self._step)))
        return Result(0)

    def _describe(self, queue: bool) -> Result:
        if (
            self._node == "there"
            and self._workers == "launched"
            and self._events[0] in ("preempted", "missing")
        ):
            self._node = self._next()
        if self._node == "missing":
            return Result(1, err="NOT_FOUND")
        if self._node == "preempted":
            return Result(0, "SUSPENDED" if queue else "PREEMPTED")
        return Result(0, "ACTIVE" if queue else "READY")

    def _poll(self) -> Result:
        state = self._workers
        if state == "launched":
            event = self._next()
            self._step += event == "saved"
            state = f"exited {event}" if event.isdigit() else "running"
        return Result(0, "".join(f"{MARK} {n} {state}\n" for n in range(self._hosts)))

    def _next(self) -> str:
        event = self._events[0]
        if len(self._events) > 1:
            del self._events[0]
        self._say(f"# {event}")
        return event
