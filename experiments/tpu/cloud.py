"""The calls of commands.py, made: answers read, failures turned into errors that show the call and what it said.

What runs a call is given, so that it can be gcloud, a print, or a played scenario."""

import dataclasses
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable

from experiments.tpu import commands
from experiments.tpu.source import Bundle
from rlhf_jax.errors import InputError, PeerLost, RunError, StorageError

POLL_TIMEOUT_SECONDS, TIMEOUT_SECONDS = 300, 7200
MISSING = "MISSING"  # in the place of a state


class NoCapacity(PeerLost):
    """The zone has no such slice free now; asking again is all there is to do."""


@dataclasses.dataclass(frozen=True)
class Result:
    status: int
    out: str = ""
    err: str = ""


@dataclasses.dataclass(frozen=True)
class Worker:
    number: str
    state: str  # bare (not set up), idle (nothing launched), running, exited, lost (the machine was started anew)
    status: int | None = None  # of exited


def execute(call: list[str], timeout_seconds: int = TIMEOUT_SECONDS) -> Result:
    """Runs gcloud.  Raises: InputError if it is not installed."""
    pipe = subprocess.PIPE
    try:
        # A group of its own: gcloud starts an ssh for each worker, and none may outlive it.
        running = subprocess.Popen(
            call,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            text=True,
            errors="replace",
            process_group=0,
        )
    except FileNotFoundError:
        raise InputError(
            "gcloud is not installed, or not on PATH. Install it (https://cloud.google.com/sdk/docs/install), then "
            "run gcloud auth login and gcloud config set project PROJECT."
        ) from None
    with running:
        try:
            out, err = running.communicate(timeout=timeout_seconds)
        except BaseException as error:  # Ctrl-C too
            os.killpg(running.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return Result(255, err=f"no answer for {timeout_seconds} seconds")
            raise
    return Result(running.returncode, out, err)


class Cloud:
    def __init__(self, job: commands.Job, bundle: Bundle, run: Callable[..., Result] = execute, say=print):
        self.job, self.bundle, self._run, self._say = job, bundle, run, say

    def state(self) -> str:
        """READY, another state of Cloud TPU, or MISSING.  Raises: PeerLost if the cloud could not be asked."""
        if self.job.queued:
            state = self._describe(commands.queue_state(self.job))
            if state != "ACTIVE":
                return state
        return self._describe(commands.node_state(self.job))

    def create(self) -> None:
        self._all(commands.create(self.job))

    def delete(self) -> None:
        """Also if it is not there."""
        for call in commands.delete(self.job):
            result = self._run(call)
            if result.status and not _not_found(result):
                raise _failure(call, result)

    def set_up(self) -> None:
        self._say("setting up all workers: code, Python, packages (some minutes) ...")
        with self.bundle.with_token():
            self._all(commands.set_up(self.job, self.bundle.files))

    def launch(self) -> None:
        self._all(commands.launch(self.job))

    def stop(self) -> None:
        self._all(commands.stop(self.job))

    def poll(self) -> list[Worker]:
        """In order.  Raises: PeerLost if not all workers answered."""
        call = commands.poll(self.job)
        result = self._run(call, POLL_TIMEOUT_SECONDS)
        lines = [line.split() for line in result.out.splitlines() if line.startswith(commands.MARK + " ")]
        workers = [Worker(x[1], x[2], int(x[3]) if len(x) > 3 else None) for x in lines if len(x) > 2]
        expected = self.job.slice.hosts if self.job.slice else None
        if result.status or not workers or (expected and len(workers) != expected):
            raise _failure(call, result, f"{len(workers)} of {expected or '?'} workers answered")
        return sorted(workers, key=lambda worker: (len(worker.number), worker.number))

    def log(self, first_line: int) -> tuple[set[str], list[str]]:
        """(names of what is saved, whole lines of the log of process 0 from first_line, counted from 1, on)."""
        call = commands.log(self.job, first_line)
        result = self._run(call, POLL_TIMEOUT_SECONDS)
        if result.status:
            raise _failure(call, result)
        mark = f"{commands.MARK} saved "
        lines = [line for line in result.out.split("\n")[:-1] if not line.startswith(mark)]
        saved = {line.removeprefix(mark) for line in result.out.splitlines() if line.startswith(mark)}
        return saved, lines

    def _describe(self, call: list[str]) -> str:
        result = self._run(call, POLL_TIMEOUT_SECONDS)
        if result.status == 0:
            return result.out.strip() or "UNKNOWN"
        if _not_found(result):
            return MISSING
        raise PeerLost(_told(call, result))

    def _all(self, calls: list[list[str]]) -> None:
        for call in calls:
            result = self._run(call)
            if result.status:
                raise _failure(call, result)


def _not_found(result: Result) -> bool:
    return result.status != 0 and bool(re.search(r"NOT_FOUND|not found", result.err))


def _failure(call: list[str], result: Result, what: str = "") -> RunError:
    """74 is what worker.sh says of storage, 2 of wrong use; of ssh, 1 and 255 are the connection's or gcloud's own."""
    told = _told(call, result, what)
    remote = {"ssh", "scp"} & set(call)
    if remote and result.status in (2, 74):
        return {2: InputError, 74: StorageError}[result.status](told)
    if remote and result.status in (0, 1, 76, 255):
        return PeerLost(told)
    if "create" in call and re.search(r"capacity|stockout", result.err, re.IGNORECASE):
        return NoCapacity(told)
    return RunError(told)


def _told(call: list[str], result: Result, what: str = "") -> str:
    said = "\n".join((result.err or result.out).strip().splitlines()[-20:])
    return f"this call ended with status {result.status}{what and ', ' + what}:\n  {shlex.join(call)}\n{said}"
