"""Ours beside TRL (or transformers) and Tunix: the same weights and batches, one iteration of each in turn.

python -m benchmarks.peers [--workloads=sample_S,ppo_full_S] [--sides=ours,trl,tunix] [--rounds=5] [--json=FILE]

Makes the peers' environments where they are missing (some GB), random weights of each shape, and starts a process a
side. Nothing is timed before all sides give the same log-probabilities on the same weights (to 1e-4). Prints the table
in Markdown: medians, the lowest and highest of the rounds, the ratio to the faster peer, the share of the floor."""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys

from benchmarks import environments, floor
from benchmarks.workloads import WORKLOADS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIDES = ("ours", "trl", "tunix")
TABLE = [name for name in WORKLOADS if not name.endswith("_T")]
TOLERANCE = 1e-4  # of log-probabilities
WARM_UPS = 2


class Ended(Exception):
    """A side's process, before it had an answer: most often it was killed for its memory."""


class Side:
    """A process that holds one workload ready."""

    def __init__(self, side: str, workload: str, model_dir: str, folder: str):
        name = "trl_ppo" if (side, WORKLOADS[workload].kind) == ("trl", "ppo") else side
        self.name, self.log = name, os.path.join(folder, f"{workload}.{side}.log")
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": str(os.cpu_count()),
            "PYTHONPATH": ROOT,
        }
        python = environments.python_of(name, folder)
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [python, "-m", f"benchmarks.sides.{side}", workload, model_dir], cwd=ROOT, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self.logprobs = self.read()["logprobs"]

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise Ended(f"{self.name} ended (status {self.process.wait()}); its last words are in {self.log}")
        return json.loads(line)

    def ask(self, command: str) -> dict:
        with contextlib.suppress(BrokenPipeError):  # it has ended, as reading will tell
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        return self.read()

    def run(self) -> float:
        return self.ask("run")["seconds"]

    def close(self):
        self.process.kill()
        self.process.wait()


def can(side: str, workload: str) -> bool:
    """Tunix has no critic beside a policy with adapters."""
    return (side, WORKLOADS[workload].kind, WORKLOADS[workload].lora) != ("tunix", "ppo", True)


def measure(workload: str, sides: list[str], rounds: int, folder: str) -> dict:
    """{side: first iteration, seconds of each round, peak memory}."""
    shape = WORKLOADS[workload].shape
    model_dir = os.path.join(folder, "models", shape)
    subprocess.run([sys.executable, "-m", "benchmarks.sides.models", shape, model_dir], cwd=ROOT, check=True)
    running = {}
    try:
        for side in sides:
            running[side] = Side(side, workload, model_dir, folder)
            check_same(workload, side, running[side].logprobs, running[sides[0]].logprobs)
        turns = [of_all(running, Side.run) for _ in range(WARM_UPS + rounds)]
        peaks = of_all(running, lambda side: side.ask("memory")["peak_bytes"])
    except Ended as error:  # before it had anything to do
        sys.exit(f"error: {error}")
    finally:
        for one in running.values():
            one.close()
    seconds = {side: [turn[side] for turn in turns] for side in peaks}
    return {
        side: {"first": one[0], "seconds": one[WARM_UPS:], "peak_bytes": peaks[side]}
        for side, one in seconds.items()
    }


def of_all(running: dict, question) -> dict:
    """{side: its answer}, one after the other; a side that has ended is told of and left out from here on."""
    answers = {}
    for side, one in list(running.items()):
        try:
            answers[side] = question(one)
        except Ended as error:
            print(f"error: {error}", file=sys.stderr)
            running.pop(side).close()
    return answers


def check_same(workload, side, logprobs, expected):
    gap = max(abs(a - b) for x, y in zip(logprobs, expected, strict=True) for a, b in zip(x, y, strict=True))
    if not gap <= TOLERANCE:
        sys.exit(
            f"error: {workload}: log-probabilities of {side} are off by {gap:.1e}: it computes something else"
        )


def row(workload: str, found: dict, rate: float) -> str:
    median = {side: statistics.median(one["seconds"]) for side, one in found.items()}
    peers = [seconds for side, seconds in median.items() if side != "ours"]
    least = floor.flops(WORKLOADS[workload]) / rate
    cells = [workload]
    for side in SIDES:
        if side in found:
            low, high = min(found[side]["seconds"]), max(found[side]["seconds"])
            cells.append(f"{median[side]:.3g} ({low:.3g} to {high:.3g})")
        else:
            cells.append("")
    ours = median.get("ours")
    cells.append(f"{min(peers) / ours:.2f}" if peers and ours else "")
    cells += [f"{least:.3g}", f"{least / ours:.0%}" if ours else ""]
    memory = [f"{found[side]['peak_bytes'] / 1e9:.1f}" if side in found else "-" for side in SIDES]
    first = [f"{found[side]['first']:.0f}" if side in found else "-" for side in SIDES]
    return "| " + " | ".join([*cells, " / ".join(memory), " / ".join(first)]) + " |"


COLUMNS = ("workload", "ours, s", "TRL, s", "Tunix, s", "times faster than the faster peer", "floor, s",
           "share of the floor", "peak GB", "first iteration, s")  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", default=",".join(TABLE))
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", default=os.path.join(ROOT, ".bench"), help="environments, weights and logs"
    )
    parser.add_argument("--json", help="a file for all that was measured")
    flags = parser.parse_args()
    sides, names = flags.sides.split(","), flags.workloads.split(",")
    unknown = [name for name in names if name not in WORKLOADS] + [
        side for side in sides if side not in SIDES
    ]
    if unknown:
        parser.error(
            f"unknown: {', '.join(unknown)}; workloads: {', '.join(WORKLOADS)}; sides: {', '.join(SIDES)}"
        )
    os.makedirs(flags.folder, exist_ok=True)
    rate = floor.matmul_rate()
    for side in sides:
        print(f"{side}: {environments.versions(side, flags.folder)}")
    print(
        f"{os.cpu_count()} CPU cores, float32, best matmul {rate / 1e9:.0f} GFLOP/s, {flags.rounds} rounds\n\n{HEAD}"
    )
    results = {}
    for name in names:
        results[name] = measure(name, [s for s in sides if can(s, name)], flags.rounds, flags.folder)
        print(row(name, results[name], rate), flush=True)
        if flags.json:
            with open(flags.json, "w") as file:
                json.dump({"matmul_rate": rate, "workloads": results}, file, indent=1)


if __name__ == "__main__":
    main()
