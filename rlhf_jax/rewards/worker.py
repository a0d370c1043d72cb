"""The other end of process.py: runs one reward function, a JSON line in, a JSON line out.

Imports the standard library, errors, specs and rules, so it starts in a few hundredths of a second and never opens
the accelerator. Knows no time limit: whoever started it kills it."""

import fcntl
import importlib
import inspect
import itertools
import json
import os
import reprlib
import socket
import sys
import traceback
from collections.abc import Callable

from rlhf_jax.rewards import specs

LARGEST = 3.4e38  # float32, which scores become


def arguments(function: Callable) -> tuple[list[str], list[str] | None]:
    """(names that the function must be given, names that it may be given; None: any)."""
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have none
        return [], None
    named = [one for one in known if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    anything = any(one.kind is one.VAR_KEYWORD for one in known)
    return [p.name for p in named if p.default is p.empty], None if anything else [p.name for p in named]


def evaluate(function: Callable, columns: dict[str, list]) -> dict:
    """{"scores": one entry a completion, a finite float or the reason why there is none} or {"error": reason}."""
    size = len(next(iter(columns.values())))
    try:
        result = function(**columns)
        if result is None or isinstance(result, str | bytes | dict | set | float | int):
            return {"error": f"returned {reprlib.repr(result)}; expected a list of {size} numbers"}
        entries = list(itertools.islice(result, size + 1))  # not for ever, if it is a generator
    except (Exception, SystemExit) as error:
        return {"error": described(error)}
    if len(entries) != size:
        found = f"more than {size}" if len(entries) > size else len(entries)
        return {"error": f"returned {found} scores for {size} completions"}
    return {"scores": [_entry(value) for value in entries]}


def described(error: BaseException) -> str:
    """Type, message and the line that raised, on one line."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    frames = traceback.extract_tb(error.__traceback__)
    between = (__file__, specs.__file__, importlib.__file__)
    frames = [one for one in frames if one.filename not in between and not one.filename.startswith("<frozen")]
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return (text if len(text) <= 300 else text[:300] + "...") + where


def _entry(value) -> float | str:
    try:
        number = None if isinstance(value, str | bytes) else float(value)
    except Exception:  # None, complex, an object of the user's
        number = None
    if number is None:
        return f"returned {reprlib.repr(value)}, which is not a number"
    return number if abs(number) <= LARGEST else f"returned {number}"


def _end_with_parent() -> None:
    """Standard input is a pipe that only the parent holds: when it closes, the kernel ends us and what we started.

    Even inside C code that never lets go of the interpreter, where no thread or Python signal handler would run.
    """
    fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())  # minus: the whole group
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)  # SIGIO, which ends a process


def main(descriptor: int) -> None:
    _end_with_parent()
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    with connection, connection.makefile("rb") as lines:

        def reply(message):
            connection.sendall(json.dumps(message).encode() + b"\n")

        try:
            function = specs.parse(json.loads(next(lines))["spec"]).load()
        except (Exception, SystemExit) as error:
            reply({"error": described(error)})
            return
        required, accepted = arguments(function)
        reply({"required": required, "accepted": accepted})
        for line in lines:
            reply(evaluate(function, json.loads(line)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
