"""How a side is driven: one JSON object a line, commands on stdin, answers on the stdout it was started with.

A side builds its workload, answers `ready` with the log-probabilities that show that it computes what the others do,
and then makes one iteration for each `run`. A trainer with a loop of its own is held at a Gate between iterations."""

import dataclasses
import json
import os
import sys
import time


class Stop(Exception):
    """Asked to end; raised through whatever loop holds the gate."""


@dataclasses.dataclass
class Gate:
    """Called where an iteration begins: ends the timing of the last, waits, and begins the next."""

    commands: object
    answers: object
    started: float | None = None

    def answer(self, **fields):
        self.answers.write(json.dumps(fields) + "\n")
        self.answers.flush()

    def __call__(self):
        if self.started is not None:
            self.answer(seconds=time.perf_counter() - self.started)
        for line in self.commands:
            command = json.loads(line)
            if command == "run":
                self.started = time.perf_counter()
                return
            assert command == "memory", command
            self.answer(peak_bytes=peak_bytes())
        raise Stop


def peak_bytes() -> int:
    """The largest resident size of this process since it began."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def serve(build) -> None:
    """build(workload, model directory, gate) -> (log-probabilities [rows, T - 1] of `probe`; a function that loops
    through the gate)."""
    from benchmarks.workloads import WORKLOADS

    # Answers go where stdout was; what libraries print joins the rest on stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, model_dir = sys.argv[1:3]
    gate = Gate(sys.stdin, answers)
    logprobs, loop = build(WORKLOADS[name], model_dir, gate)
    gate.answer(logprobs=[[float(x) for x in row] for row in logprobs])
    try:
        loop()
    except Stop:
        os._exit(0)  # a side's helper threads must not hold the next one up
    raise RuntimeError(f"{name}: its own loop ended before it was asked to")


def forever(gate: Gate, iteration):
    """The loop of a side whose iteration is one call that waits for its own result."""

    def loop():
        while True:
            gate()
            iteration()

    return loop


def probe(vocab_size: int) -> list[list[int]]:
    """Token ids [2, 24] on which the sides' log-probabilities are compared."""
    import random

    draw = random.Random(7)
    return [[draw.randrange(3, vocab_size) for _ in range(24)] for _ in range(2)]
