"""Follows a run on a slice to its end: what to do about each exit status, preemption and silence.

Knows nothing of gcloud; clock and cloud are given."""

from collections.abc import Callable

from experiments.tpu.cloud import MISSING, Cloud, NoCapacity, Worker
from rlhf_jax.errors import InputError, PeerLost, RunError

AGAIN = (75, 76, 134, 137, 143)  # interrupted, peer lost, abort (JAX's own end), killed, terminated: resume
STOPS = (2, 3, 74)  # wrong input, a policy that stops, storage: the same would happen again
# Of nodes and queued resources that will not come back by themselves. (STOPPED is somebody's wish.)
GONE = (MISSING, "PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED")
POLL_SECONDS = 30
GRACE_SECONDS = 60  # for the others, once one has failed: they notice by themselves
GRACE_POLLS = 20  # for the others, once one is done
MAX_SILENT_POLLS = 10
MAX_WAIT_SECONDS = 600


class GaveUp(RunError):
    status = 76


class Watch:
    """may_create: whether a slice that was never seen is to be created, and a run that was never seen launched."""

    def __init__(
        self, cloud: Cloud, sleep: Callable, say=print, max_restarts: int = 5, may_create: bool = False
    ):
        self._cloud, self._sleep, self._say, self._max_restarts = cloud, sleep, say, max_restarts
        self._may_create, self._had_slice = may_create, False
        self._saved, self._saved_before, self._restarts = set(), set(), 0
        self._next_line, self._silent, self._done_polls, self._last = 1, 0, 0, ""

    def follow(self) -> int:
        """The exit status of the run: 0, or one that is not to be run again.

        Raises: GaveUp after max_restarts without a newer checkpoint; PeerLost if the workers cannot be reached.
        """
        status = None
        while status is None:
            try:
                status = self._step()
                self._silent = 0
            except NoCapacity as error:
                self._tell(f"no capacity now, asking again in {MAX_WAIT_SECONDS} s: {error}")
                self._sleep(MAX_WAIT_SECONDS)
            except PeerLost as error:
                self._silent += 1
                if self._silent > MAX_SILENT_POLLS:
                    raise
                self._tell(f"no answer ({self._silent} of {MAX_SILENT_POLLS}): {error}")
                self._sleep(_backoff(self._silent))
        return status

    def _step(self) -> int | None:
        state = self._cloud.state()
        if state in GONE:
            return self._recreate(state)
        self._had_slice = True
        if state != "READY":
            self._tell(f"the slice is {state}")
            self._sleep(POLL_SECONDS)
            return None
        workers = self._cloud.poll()
        states = {worker.state for worker in workers}
        if states & {"bare", "idle"}:
            return self._start(states)
        self._may_create = True  # what was seen to run is ours to bring back
        self._read_log()
        if "running" not in states:
            return self._decide(workers)
        self._tell(_summary(workers))
        failed = [w for w in workers if w.state == "lost" or (w.state == "exited" and w.status)]
        self._done_polls = self._done_polls + 1 if "exited" in states else 0
        if failed or self._done_polls > GRACE_POLLS:
            self._sleep(GRACE_SECONDS)
            self._cloud.stop()  # a process without its peers hangs
        else:
            self._sleep(POLL_SECONDS)
        return None

    def _recreate(self, state: str) -> None:
        if not self._may_create:
            raise InputError(
                f"the slice is {state} and this is not the watch that saw it run; the action `resume` creates it, "
                "sets it up and goes on from the last checkpoint."
            )
        if self._had_slice or state != MISSING:
            self._count(f"the slice is {state}")
        if state != MISSING:
            self._tell(f"deleting what is left of the slice ({state})")
            self._cloud.delete()
        self._tell("creating the slice")
        self._cloud.create()
        self._had_slice = True

    def _start(self, states: set[str]) -> None:
        if not self._may_create:
            missing = "set up" if "bare" in states else "launched"
            raise InputError(
                f"nothing was {missing} on this slice; the actions `setup` and `launch` do, or `resume`."
            )
        if "bare" in states:
            if "running" in states:
                self._cloud.stop()
            self._cloud.set_up()
        self._launch()

    def _decide(self, workers: list[Worker]) -> int | None:
        """All have ended."""
        statuses = [137 if worker.status is None else worker.status for worker in workers]
        self._tell(_summary(workers))
        final = [status for status in statuses if status not in (0, *AGAIN)]
        if final:
            return next((status for status in final if status in STOPS), final[0])
        if not any(statuses):
            return 0
        self._count(_summary(workers))
        self._cloud.stop()  # what a process may have left behind
        return self._launch()

    def _launch(self) -> None:
        self._tell("launching on all workers")
        self._cloud.launch()
        self._next_line, self._done_polls = 1, 0

    def _count(self, why: str) -> None:
        """One more restart; the count begins anew with each newer checkpoint."""
        self._restarts = 1 if self._saved - self._saved_before else self._restarts + 1
        self._saved_before = set(self._saved)
        if self._restarts > self._max_restarts:
            raise GaveUp(
                f"{self._max_restarts} restarts without a newer checkpoint; the last end was: {why}. Read the logs in "
                f"{self._cloud.job.shared_workdir}.logs; the slice is still there if it was not preempted."
            )
        wait = _backoff(self._restarts)
        self._tell(
            f"restart {self._restarts} of {self._max_restarts} without a newer checkpoint, in {wait} s: {why}"
        )
        self._sleep(wait)

    def _read_log(self) -> None:
        saved, lines = self._cloud.log(self._next_line)
        self._next_line += len(lines)
        for line in lines:  # completions are in it: nothing in them may speak to the terminal
            self._say("".join(c for c in line if c.isprintable() or c == "\t"))
        self._saved |= saved

    def _tell(self, text: str) -> None:
        if text != self._last:  # once, however long it lasts
            self._say(f"[tpu] {text}")
        self._last = text


def _backoff(number: int) -> int:
    return min(POLL_SECONDS * 2 ** (number - 1), MAX_WAIT_SECONDS)


def _summary(workers: list[Worker]) -> str:
    groups = {}
    for worker in workers:
        state = worker.state if worker.status is None else f"{worker.state} with status {worker.status}"
        groups.setdefault(state, []).append(worker.number)
    return "; ".join(
        f"worker{'s' * (len(numbers) > 1)} {', '.join(numbers)} {state}" for state, numbers in groups.items()
    )
