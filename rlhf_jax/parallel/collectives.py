"""What the chips of a program send each other, by kind: read from its compiled text, loops counted as they turn.

Knows XLA's collectives and how many bytes each must bring to a chip; nothing of what is in them."""

import dataclasses
import re
from collections import defaultdict

import numpy as np

from rlhf_jax.parallel import hlo


@dataclasses.dataclass(frozen=True)
class Total:
    """Of one kind, of one execution of the program, a chip."""

    count: int
    bytes: float  # that a chip receives
    seconds: float  # at the full speed of the links that its groups are spread over


def received(kind: str, result: int, operands: int, size: int) -> float:
    """Bytes that reach each of `size` devices at least.

    Args:
      result, operands: bytes of one device's result and operands.
    """
    share = (size - 1) / size
    return {
        "all-gather": result * share,
        "all-reduce": 2 * result * share,  # scattered sums, then gathered
        "reduce-scatter": operands * share,
        "all-to-all": result * share,
        "ragged-all-to-all": result * share,
        "collective-permute": float(result),
    }[kind]


def count(
    program: hlo.Program, devices: int, reach, trips: int = 1
) -> tuple[dict[str, Total], dict[str, Total]]:
    """({kind: Total} outside of loops that the data end, inside of those).

    Args:
      devices: of the program. trips: as hlo.Program.runs.
      reach: [N] numbers of the devices of a group -> bytes a second that each can receive.
    """
    found, fused = ({}, {}), set()
    for run in program.runs(trips):
        for one, scope in _collectives(program, run.instruction, run.computation):
            if run.instruction.opcode == "fusion":
                # One that goes on while others compute stands in every fusion that it overlaps with.
                channel = re.search(r"channel_id=\d+", one.text)
                mark = (run.computation, one.opcode, channel[0] if channel else one.name, run.times)
                if mark in fused:
                    continue
                fused.add(mark)
            kind = one.opcode.removesuffix("-start")
            operands = sum(a.bytes for name in one.operands if name in scope for a in scope[name].result)
            result = sum(a.bytes for a in one.result)
            if one.opcode.endswith("-start") and kind != "all-reduce":
                result = max(result - operands, 0)  # of (operands, results)
                if kind == "collective-permute":
                    result = operands
            groups = hlo.groups(one.text, devices)
            if groups is None or not groups.size:
                groups = np.arange(devices)[None]
            if kind == "collective-permute":
                groups = [_ring(groups)]
            size = len(groups[0])
            if size < 2:
                continue
            bytes_ = run.times * received(kind, result, operands, size)
            speed = min(reach(group) for group in groups[:8])
            into = found[run.by_data].setdefault(kind, defaultdict(float))
            into["count"] += run.times
            into["bytes"] += bytes_
            into["seconds"] += bytes_ / speed
    return tuple(
        {kind: Total(int(t["count"]), t["bytes"], t["seconds"]) for kind, t in sorted(part.items())}
        for part in found
    )


def _ring(pairs) -> np.ndarray:
    """The devices that the first pair hands on to, and so on: those of one ring, or line."""
    found, before = {int(pairs[0][0])}, 0
    while len(found) > before:
        before = len(found)
        found |= {int(n) for pair in pairs if set(map(int, pair)) & found for n in pair}
    return np.array(sorted(found))


def _collectives(program, one, computation):
    """(the collective, its computation): the instruction itself, or those fused into it."""
    if one.opcode in hlo.COLLECTIVES or one.opcode.removesuffix("-start") in hlo.COLLECTIVES:
        yield one, program.computations[computation]
    elif one.opcode == "fusion":
        name = hlo.called(one).get("calls")
        for inner in program.computations.get(name, {}).values():
            yield from _collectives(program, inner, name)
