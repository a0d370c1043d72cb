"""When one process of several ends, the others end: soon, with a message, and never in a hang.

A thread in each process. Every process has a connection to process 0; whoever ends says so and why, and the connection
of one that was killed breaks: within a second all know. Without it jax would notice a killed process by its heartbeat,
and one that raised not before minutes. The same thread is the watchdog of this process: a loop feeds it, and if nothing
moved for too long it writes down where every thread stands and ends the run.
Knows nothing of what is computed. Sends a few lines of JSON; knows nothing of files."""

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time

from rlhf_jax.errors import PeerLost

LOOK_SECONDS = 0.5  # between two looks at the watchdog
CONNECT_SECONDS = 10.0
GRACE_SECONDS = 3.0  # for a process that is about to end by itself, when another one has
LAST_SECONDS = GRACE_SECONDS + 2.0  # that process 0 waits for the others to end
FINAL = (2, 3, 74, 75)  # ends of the run: with another's status of these everyone ends; else with PeerLost's
TIMES = 10  # as long as ever before may a step take

_link = None  # of this process; None: it is alone


def join(index: int, count: int, from_first, host: str = "") -> None:
    """Connects this process with the others. from_first(value) -> that of process 0. host: process 0's, if known."""
    global _link
    _link = _Link(index, count, from_first, host)


def leave(status: int, why: str = "") -> None:
    """Ends this process with `status` and tells the others why. Alone it returns."""
    if _link is not None:
        _link.leave(status, why)


def wait_for_news(seconds: float = 2.0) -> None:
    """Whether an error is another's end is known in a moment; then this process ends here, and says so."""
    if _link is not None and _link.news.wait(seconds):
        time.sleep(60.0)


def part() -> None:
    """The run is over, for all: from now on nobody is missed."""
    global _link
    if _link is not None:
        _link.part()
        _link = None


def beat(phase: str = "", kind: str = "", least_seconds: float = 300.0) -> None:
    """What this process is about to do. The watchdog waits 10 times the longest that this kind has taken, and at least
    `least_seconds`; at first, when things are compiled, 10 times these. Without a phase it sleeps."""
    if _link is not None:
        _link.watch.beat(phase, kind, least_seconds)


class Watch:
    """The watchdog's memory; its clock is an argument."""

    def __init__(self, clock=time.monotonic):
        self._clock, self._longest, self._now = clock, {}, ("", "", 0.0, 0.0)

    def beat(self, phase: str, kind: str, least_seconds: float) -> None:
        _, before, since, _ = self._now
        now = self._clock()
        if before in self._longest:
            self._longest[before] = max(self._longest[before], now - since)
        elif before:  # the first time compiles, and says nothing of the others
            self._longest[before] = 0.0
        known = self._longest.get(kind, 0.0) or least_seconds
        self._now = (phase, kind, now, max(TIMES * known, least_seconds))

    @property
    def phase(self) -> str:
        return self._now[0]

    def overdue(self) -> str:
        """What has taken too long, and how long; empty if nothing has."""
        phase, _, since, limit = self._now
        took = self._clock() - since
        return (
            f"{phase} has not moved for {took:.0f} s (limit {limit:.0f} s)" if phase and took > limit else ""
        )


class _Link:
    def __init__(self, index, count, from_first, host):
        self.index, self.count, self.watch = index, count, Watch()
        self._lock, self._parted, self._leaving = threading.Lock(), False, False
        self._selector, self._buffers, self._who = selectors.DefaultSelector(), {}, {}
        self._listener, self.news = None, threading.Event()
        self._verdict, self._told = None, False
        if index == 0:
            self._listener = socket.create_server(("", 0), backlog=count)
            token = secrets.token_hex(16)
            hosts = [host] if host else []
            hosts += [socket.gethostname(), *_own_addresses()]
            where = [hosts, self._listener.getsockname()[1], token]
            self._token = from_first(where)[2]
            self._selector.register(self._listener, selectors.EVENT_READ)
        else:
            hosts, port, self._token = from_first(None)
            connection = _connect(hosts, port)
            if connection is None:  # a firewall, say: then jax's heartbeat is all there is
                print(
                    f"warning: process {index} cannot reach process 0 at {', '.join(hosts)}, port {port}; if another "
                    "process ends, this one will notice later",
                    file=sys.stderr,
                    flush=True,
                )
            else:
                self._add(connection, 0)
                self._send(connection, {"hello": index, "token": self._token})
        threading.Thread(target=self._run, name="peers", daemon=True).start()

    # What this process says

    def leave(self, status: int, why: str) -> None:
        with self._lock:
            self._leaving = True
            self._tell({"ended": self.index, "status": status, "why": why[:2000]})
        if self.index == 0:
            # jax ends the others at once when process 0 is gone: let them read why first.
            deadline = time.monotonic() + LAST_SECONDS
            while self._who and time.monotonic() < deadline:
                time.sleep(0.05)
        _exit(status)

    def part(self) -> None:
        with self._lock:
            self._parted = True
            self._tell({"bye": self.index})

    def _tell(self, message, but=None):
        for connection in list(self._who):
            if connection is not but:
                self._send(connection, message)

    def _send(self, connection, message):
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(message).encode() + b"\n")

    # What it hears

    def _run(self):
        while not self._parted:
            try:
                for key, _ in self._selector.select(LOOK_SECONDS if self._verdict is None else 0.05):
                    self._accept() if key.fileobj is self._listener else self._read(key.fileobj)
            except Exception:  # a line from elsewhere, say: whatever it is, the watch goes on
                time.sleep(LOOK_SECONDS)
            self._execute()
            overdue = self._verdict is None and self.watch.overdue()
            if overdue and not self._leaving:
                faulthandler.dump_traceback(all_threads=True)
                self._end(self.index, PeerLost.status, f"{overdue}; where it stood is above")

    def _accept(self):
        connection, _ = self._listener.accept()
        connection.settimeout(5.0)
        self._add(connection, None)

    def _add(self, connection, who):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._buffers[connection] = b""
        if who is not None:
            self._who[connection] = who
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection):
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        *lines, self._buffers[connection] = (self._buffers[connection] + data).split(b"\n")
        for line in lines:
            if not self._hear(connection, line):
                data = b""
        if not data or len(self._buffers[connection]) > 1 << 16:
            self._selector.unregister(connection)
            who = self._who.pop(connection, None)
            connection.close()
            if who is not None and not self._parted and not self._leaving:
                self._end(who, None, "it was killed, or its host is")

    def _hear(self, connection, line) -> bool:
        """Whether to go on listening to it."""
        try:
            message = json.loads(line)
            if connection not in self._who:  # the first line of somebody new
                if not secrets.compare_digest(message["token"], self._token):
                    return False
                self._who[connection] = int(message["hello"])
        except (ValueError, TypeError, KeyError):
            return False
        if "bye" in message:
            self._who.pop(connection)
        elif "ended" in message:
            self._end(message["ended"], message["status"], message["why"], but=connection)
        return True

    def _end(self, who, status, why, *, but=None):
        """The run is over because of process `who`; its status is None if it could not say so itself. This process
        gets the time to end on its own, if it is about to, with its own error."""
        if self._verdict is not None or self._leaving:
            return
        grace = 0.0 if status is None or who == self.index else GRACE_SECONDS
        self._verdict = (who, status, why, time.monotonic() + grace)
        self.news.set()
        with self._lock:
            self._tell({"ended": who, "status": status, "why": why}, but)

    def _execute(self):
        """What a verdict leads to, when its time has come."""
        if self._verdict is None or self._leaving:
            return
        who, status, why, due = self._verdict
        if time.monotonic() < due:
            return
        if not self._told:
            self._told = True
            how = (
                "" if who == self.index else " is gone" if status is None else f" ended with status {status}"
            )
            said = f"process {who} of {self.count}{how}: {why}"
            if self.watch.phase and who != self.index:
                said += f"\nThis is process {self.index}; it was at: {self.watch.phase}."
            if status not in FINAL:
                said += "\nStart all of them again, with the same command, to go on from what is saved."
            print(f"error: {said}", file=sys.stderr, flush=True)
        # jax ends the others at once when process 0 is gone: it goes last.
        if self.index or not self._who or time.monotonic() > due + LAST_SECONDS:
            _exit(status if status in FINAL else PeerLost.status)


def _exit(status):
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)  # anything gentler waits for the others


def _own_addresses() -> list[str]:
    with contextlib.suppress(OSError):
        return [socket.gethostbyname(socket.gethostname())]
    return []


def _connect(hosts, port):
    deadline = time.monotonic() + CONNECT_SECONDS
    while time.monotonic() < deadline:
        for host in hosts:
            with contextlib.suppress(OSError):
                return socket.create_connection((host, port), timeout=2.0)
        time.sleep(0.2)
    return None
