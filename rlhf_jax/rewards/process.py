"""A process with one reward function in it, that can be asked, killed and started again.

A child started with `multiprocessing` would import the run's main module, and with it JAX and the accelerator; a
thread could not be killed. So: a bare interpreter and JSON lines over a socket (no pickle). Knows nothing of scores."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref

START_SECONDS = 60.0  # for the imports of the user's module


class Lost(Exception):
    """The worker gave no answer and is gone; the message says why."""


class WorkerProcess:
    """Runs the reward that `spec` names. Not for several threads at once."""

    def __init__(self, spec: str):
        self._spec = spec
        self._process, self._connection, self._end = None, None, None

    def start(self) -> dict:
        """Starts the worker. Returns {"required", "accepted"}, as worker.arguments. Raises Lost."""
        self.stop()
        ours, theirs = socket.socketpair()
        environment = {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "JAX_PLATFORMS": "cpu",  # a reward that uses JAX must not take the trainer's accelerator
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlhf_jax.rewards.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,  # held open, never written: see worker._end_with_parent
                stdout=2,  # prints of the user's function go to standard error
                env=os.environ | environment,
                start_new_session=True,  # Ctrl-C is the parent's, and what the worker starts dies with it
            )
        self._connection = ours
        self._end = weakref.finalize(self, _end, self._process, ours)  # at a clean exit of the parent too
        ready = self._exchange({"spec": self._spec}, START_SECONDS)
        if "error" in ready:
            self.stop()
            raise Lost(ready["error"])
        return ready

    def ask(self, request: dict, limit_seconds: float) -> dict:
        """The worker's answer to one request. Starts a worker if none runs; that time is not limited.

        Raises: Lost if it is not there after `limit_seconds` or the worker ended; it is gone then, with all it
          started. ValueError or TypeError, and nothing happened, if the request is no JSON.
        """
        line = _line(request)
        if self._process is None:
            self.start()
        return self._exchange(line, limit_seconds)

    def stop(self) -> None:
        """Kills the worker, if one runs, and waits for its end."""
        if self._end is not None:
            self._end()
        self._process, self._connection, self._end = None, None, None

    def _exchange(self, request: dict | bytes, limit: float) -> dict:
        deadline = time.monotonic() + limit
        try:
            self._connection.settimeout(limit)
            self._connection.sendall(request if isinstance(request, bytes) else _line(request))
            answer = bytearray()
            while not answer.endswith(b"\n"):
                self._connection.settimeout(max(deadline - time.monotonic(), 1e-3))
                part = self._connection.recv(1 << 16)
                if not part:
                    raise ConnectionError
                answer += part
            return json.loads(answer)
        except TimeoutError:
            self.stop()
            raise Lost(f"no answer within {limit:.3g} s, killed") from None
        except OSError:
            raise Lost(f"the worker {self._last_words()}") from None
        except BaseException:  # Ctrl-C: a late answer must not be taken for that to the next request
            self.stop()
            raise

    def _last_words(self) -> str:
        try:
            status = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            status = None
        self.stop()
        if status is None:
            return "closed its connection"
        return f"died of {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def _line(request: dict) -> bytes:
    return json.dumps(request, default=_plain).encode() + b"\n"


def _plain(value):
    """What JSON lacks (arrays, dates): as lists where there is a way, else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _end(process: subprocess.Popen, connection: socket.socket) -> None:
    connection.close()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody of the group is left
        pass
    process.stdin.close()
    process.wait()
