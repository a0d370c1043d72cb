"""The text of a compiled program, read: its instructions, how often each runs, and what each moves.

Shapes in it are those of one device, after the partitioner; loops are still loops, so what stands in one counts as
often as it turns. Knows XLA's notation, nothing of chips or models."""

import dataclasses
import functools
import math
import re

import numpy as np

BITS = {"pred": 8, "c64": 64, "c128": 128, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f4e2m1fn": 4}
BITS |= {f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)}

_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.+)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_OPCODE = re.compile(r" ([a-z][\w-]*)\(")
_CALLED = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    bytes: int
    in_hbm: bool  # not in the chip's own fast memory


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str  # what follows the operands
    root: bool
    arguments: str  # the operands as written


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction and how often the program runs it."""

    instruction: Instruction
    times: int
    by_data: bool  # in a loop that the data end: then at most so often
    computation: str


class Program:
    """compiled.as_text(), read."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if line.startswith((" ", "\t")):
                found = _instruction(line) if current is not None else None
                if found is not None:
                    current[found.name] = found
                continue
            header = _COMPUTATION.match(line)
            current = None
            if header:
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry

    def runs(self, trips: int = 1):
        """Every Run, of all that is not inside a fusion. trips: of loops whose end no constant in them gives."""
        yield from self._runs(self.entry, 1, False, trips)

    def _runs(self, computation, times, by_data, trips):
        for one in self.computations.get(computation, {}).values():
            yield Run(one, times, by_data, computation)
            names_of = called(one)
            if one.opcode == "while":
                turns, exact = self.trip_count(one, names_of["condition"], trips)
                yield from self._runs(names_of["body"], times * turns, by_data or not exact, trips)
            elif one.opcode in ("call", "async-start"):
                for name in (names_of.get("to_apply"), names_of.get("calls")):
                    if name:
                        yield from self._runs(name, times, by_data, trips)
            elif one.opcode == "conditional":
                # The dearest branch is the one with the most to do; the others of ours do nothing.
                named = _BRANCHES.search(one.text)
                names = [n.strip().lstrip("%") for n in named[1].split(",")] if named else [
                    names_of[k] for k in ("true_computation", "false_computation") if k in names_of]  # fmt: skip
                longest = max(names, key=lambda name: len(self.computations.get(name, {})), default=None)
                if longest:
                    yield from self._runs(longest, times, by_data, trips)

    def trip_count(self, loop: Instruction, condition: str, trips: int) -> tuple[int, bool]:
        """(how often the loop turns, whether that is certain): `trips` of one that the data end."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known[1]), True
        inside = self.computations.get(condition, {})
        root = next((one for one in inside.values() if one.root), None)
        seen = self._plain(root, inside) if root is not None else None
        if seen is None or "direction=LT" not in seen[0].text:
            return trips, False
        compare, scope, values = seen
        for operand in compare.operands:
            limit = values.get(operand) if values else _constant(scope.get(operand))
            if limit is not None:
                return max(limit, 1), True
        return trips, False

    def _plain(self, root, inside):
        """(the comparison that is the condition, its computation, constants of its parameters), through a fusion."""
        if root.opcode == "compare":
            return root, inside, None
        if root.opcode != "fusion":
            return None
        fused = self.computations.get(called(root).get("calls"), {})
        compare = next((one for one in fused.values() if one.root and one.opcode == "compare"), None)
        if compare is None:
            return None
        values = {}
        for one in fused.values():
            if one.opcode == "parameter":
                values[one.name] = _constant(inside.get(root.operands[int(one.arguments)]))
            else:
                values[one.name] = _constant(one)
        return compare, fused, values

    # Memory

    def traffic(self, run: Run) -> int:
        """Bytes between HBM and the chip of one run of the instruction: operands read, results written.

        A slice of a large array moves the slice, a write into one what is written.
        """
        one, scope = run.instruction, self.computations[run.computation]
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return 0
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return _large(one.result) + _in_hbm(one.result)
        if one.opcode in ("dynamic-update-slice", "scatter"):
            update = scope.get(one.operands[1 if one.opcode[0] == "d" else -1])
            return 2 * _in_hbm(update.result) if update else 0
        operands = [scope[name].result if name in scope else () for name in one.operands]
        if one.opcode in ("copy-start", "slice-start"):
            # Of (destination, source, ...): one side is in HBM, or both are.
            return sum(array.bytes for array in one.result[:2] if array.in_hbm and array.bytes) if (
                one.opcode == "copy-start") else one.result[-2].bytes  # fmt: skip
        if one.opcode == "fusion":
            return self._fusion(one, operands)
        if one.opcode in COLLECTIVES or one.opcode.removesuffix("-start") in COLLECTIVES:
            result = one.result if not one.opcode.endswith("-start") else one.result[len(one.result) // 2 :]
            return _in_hbm(result) + sum(map(_in_hbm, operands))
        return _in_hbm(one.result) + sum(map(_in_hbm, operands))

    def _fusion(self, one, operands):
        inside = self._inner(called(one)["calls"])
        results = one.result
        if inside.collective:  # what only passes through, while a collective goes on, moves nothing
            aliased = re.search(r"output_to_operand_aliasing=\{(.*?)\}, calls", one.text)
            pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\d*\}\)", aliased[1]) if aliased else []
            results = [x for n, x in enumerate(results) if str(n) not in {i for i, _ in pairs}]
            if any(index == "" for index, _ in pairs):
                results = []
            operands = [() if str(n) in {o for _, o in pairs} else x for n, x in enumerate(operands)]
        moved = 0
        for number, arrays in enumerate(operands):
            if _in_hbm(arrays):
                limit = inside.read.get(number)
                moved += _in_hbm(arrays) if limit is None else min(limit, _in_hbm(arrays))
        written = _in_hbm(results)
        return moved + (written if inside.written is None else min(inside.written, written))

    def _inner(self, name):
        cache = self.__dict__.setdefault("_fused", {})
        if name not in cache:
            cache[name] = self._look_inside(self.computations.get(name, {}))
        return cache[name]

    def _look_inside(self, scope):
        """What a fusion reads of each parameter, and writes, where that is less than the whole."""
        readers: dict[str, list[tuple[Instruction, int]]] = {}
        for one in scope.values():
            for place, operand in enumerate(one.operands):
                readers.setdefault(operand, []).append((one, place))

        def read(name):
            """Bytes, or None: all of it."""
            total = 0
            for one, place in readers.get(name, ()):
                if one.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                    total += _large(one.result)
                elif one.opcode == "dynamic-update-slice" and place == 0:
                    continue  # in place
                elif one.opcode in ("bitcast", "copy", "reshape", "get-tuple-element"):
                    deeper = read(one.name)
                    if deeper is None:
                        return None
                    total += deeper
                elif one.opcode == "fusion":
                    deeper = self._inner(called(one)["calls"]).read.get(place)
                    if deeper is None:
                        return None
                    total += deeper
                else:
                    return None
            return total

        parameters = {int(one.arguments): one for one in scope.values() if one.opcode == "parameter"}
        limits = {number: read(one.name) for number, one in parameters.items()}
        root = next((one for one in scope.values() if one.root), None)
        while root is not None and root.opcode in ("bitcast", "copy", "reshape"):
            root = scope.get(root.operands[0])
        written = None
        if root is not None and root.opcode == "dynamic-update-slice":
            update = scope.get(root.operands[1])
            written = _large(update.result) if update else None
        elif root is not None and root.opcode == "tuple":
            parts = [scope.get(name) for name in root.operands]
            if any(part is not None and part.opcode == "dynamic-update-slice" for part in parts):
                written = 0
                for part in parts:
                    if part is not None and part.opcode == "dynamic-update-slice":
                        update = scope.get(part.operands[1])
                        written += _large(update.result) if update else 0
                    elif part is not None:
                        written += _in_hbm(part.result)
        sends = any(one.opcode.removesuffix("-start") in COLLECTIVES for one in scope.values())
        return _Inner({k: v for k, v in limits.items() if v is not None}, written, sends)


@dataclasses.dataclass(frozen=True)
class _Inner:
    read: dict[int, int]
    written: int | None
    collective: bool  # it is a part of one


COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
# Moves nothing, or what the instructions inside are counted for.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
         "partition-id", "replica-id", "iota", "opt-barrier", "async-start", "domain", "broadcast")  # fmt: skip


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    root, name, rest = found.groups()
    opcode = (
        _OPCODE.search(" " + rest) if not rest.startswith("(") else _OPCODE.search(rest, _closing(rest, 0))
    )
    if not opcode:
        return None
    shift = 0 if rest.startswith("(") else 1
    start = opcode.end() - shift - 1
    end = _closing(rest, start)
    arguments = rest[start + 1 : end]
    return Instruction(
        name,
        opcode[1],
        arrays(rest[: opcode.start()]),
        tuple(re.findall(r"%([\w.-]+)", arguments)) or _bare(arguments),
        rest[end + 1 :],
        bool(root),
        arguments,
    )


def _bare(arguments: str) -> tuple[str, ...]:
    """Names without a percent sign, as some printers leave them."""
    return tuple(re.findall(r"(?:^|,\s*)(?:\S+ )?([a-zA-Z_][\w.-]*)(?=,|$)", arguments))


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1


@functools.lru_cache(maxsize=65536)
def arrays(text: str) -> tuple[Array, ...]:
    """Of a shape, or a tuple of them, as written. Padding of the layout is not counted."""
    found = []
    for kind, sizes, layout in _SHAPE.findall(text):
        if kind in BITS or kind.startswith("f8"):
            number = math.prod(int(size) for size in sizes.split(",") if size)
            space = re.search(r"S\((\d+)\)", layout or "")
            found.append(Array(-(-number * BITS.get(kind, 8) // 8), space is None or space[1] == "0"))
    return tuple(found)


def called(one: Instruction) -> dict[str, str]:
    """{role: computation} that it calls."""
    return dict(_CALLED.findall(one.text))


def _constant(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.arguments):
        return None
    return int(one.arguments)


def _in_hbm(found) -> int:
    return sum(array.bytes for array in found if array.in_hbm)


def _large(found) -> int:
    return sum(array.bytes for array in found)


def groups(text: str, devices: int) -> np.ndarray | None:
    """[groups, N] numbers of the devices of each group of a collective; None if it names none (then: all).

    Three notations: {{0,1},{2,3}}; [2,4]<=[4,2]T(1,0); mesh['a'=2,'b'=4] {'b'}.
    """
    found = re.search(r"(?:replica_groups|source_target_pairs)=(.*)$", text)
    if not found:
        return None
    rest = found[1]
    if rest.startswith("{{"):
        inner = rest[2 : rest.index("}}")]
        rows = [[int(n) for n in row.split(",") if n.strip()] for row in inner.split("},{")]
        return np.array(rows) if len({len(row) for row in rows}) == 1 else None
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, sizes, order = (tuple(map(int, part.split(","))) if part else None for part in iota.groups())
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        return (numbers if order is None else numbers.transpose(order)).reshape(shape)
    mesh = re.match(
        r"mesh\[([^\]]*)\]\s*(?:device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)\s*)?\{([^}]*)\}", rest
    )
    if mesh:
        axes = re.findall(r"'([^']+)'=(\d+)", mesh[1])
        names, sizes = [name for name, _ in axes], [int(size) for _, size in axes]
        numbers = np.arange(math.prod(sizes))
        if mesh[2]:
            numbers = numbers.reshape([int(n) for n in mesh[2].split(",")])
            if mesh[3]:
                numbers = numbers.transpose([int(n) for n in mesh[3].split(",")])
        numbers = numbers.reshape(sizes)
        picked = [names.index(name) for name in re.findall(r"'([^':]+)'", mesh[4]) if name in names]
        others = [axis for axis in range(len(names)) if axis not in picked]
        width = math.prod(sizes[axis] for axis in picked)
        return numbers.transpose([*others, *picked]).reshape(-1, width) if picked else None
    return None
