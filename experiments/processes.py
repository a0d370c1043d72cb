"""Commands of a sweep as processes of their own, so that the end of one is not the end of all."""

import contextlib
import re
import signal
import subprocess
import sys

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Processes:
    """Runs one command at a time; a signal that would end the sweep goes to the command, which saves its state."""

    def __init__(self):
        self.stopped, self._child = False, None

    def __enter__(self):
        handled = [s for s in STOPS if signal.getsignal(s) is not signal.SIG_IGN]  # as nohup has it
        self._before = {s: signal.signal(s, self._handle) for s in handled}
        return self

    def __exit__(self, *exception):
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def _handle(self, number, frame):
        self.stopped = True
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGTERM)

    def run(self, arguments: list[str], log: str) -> tuple[int, str]:
        """(exit status, the last error) of experiments.run; its output goes to log.log and log.err."""
        command = [sys.executable, "-m", "experiments.run", *arguments]
        with open(f"{log}.log", "ab") as out, open(f"{log}.err", "wb") as err:
            # A group of its own: Ctrl-C would reach it twice, and the second leaves at once.
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0
            )
            if self.stopped:  # between the two lines above
                self._child.send_signal(signal.SIGTERM)
            status = self._child.wait()
            self._child = None
        with open(f"{log}.err", encoding="utf-8", errors="replace") as file:
            said = last_error(file.read())
        if status < 0:
            killed = "out of memory? " if status == -signal.SIGKILL else ""
            return 128 - status, f"{killed}killed by signal {-status}; {said}".rstrip("; ")
        return status, said


def last_error(text: str) -> str:
    """The last line that says what was wrong, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (telling or lines or [""])[-1]
