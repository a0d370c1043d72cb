"""Two processes of one program on loopback, each with four virtual devices. None outlives its block."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOUR = re.sub(r"device_count=\d+", "device_count=4", os.environ["XLA_FLAGS"])

# Its threads write at once: a line may lack its beginning.
GLOO = re.compile(r"^\[Gloo\]|peer ranks is : \d+$|^$")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Pair(contextlib.AbstractContextManager):
    def __init__(self, folder, *arguments, own=((), ()), cwd=(ROOT, ROOT)):
        """python ARGUMENTS, with the flags that name the processes. own, cwd: of each."""
        os.makedirs(folder, exist_ok=True)
        self.logs = [os.path.join(folder, f"{n}.log") for n in (0, 1)]
        environment = os.environ | {"XLA_FLAGS": FOUR, "PYTHONPATH": ROOT}
        flags = (f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2")
        self.processes = []
        for n in (0, 1):
            command = [sys.executable, "-u", *arguments, *flags, f"--process_id={n}", *own[n]]
            with open(self.logs[n], "wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=cwd[n]
                    )
                )

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, n):
        with open(self.logs[n], encoding="utf-8", errors="replace") as file:
            return "".join(line for line in file if not GLOO.search(line))

    def wait_for(self, line, seconds=600):
        """Until process 0 has printed a line that begins so."""
        deadline = time.monotonic() + seconds
        while not any(one.startswith(line) for one in self.log(0).splitlines()):
            assert time.monotonic() < deadline and self.processes[0].poll() is None, self.log(0) + self.log(1)
            time.sleep(0.05)

    def send(self, n, which=signal.SIGKILL):
        self.processes[n].send_signal(which)

    def statuses(self, seconds=600):
        """Of both, which end within this time."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
