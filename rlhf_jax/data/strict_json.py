"""JSON as its standard has it, with a reason for whatever is not: Python's reader lets pass NaN, keys given
twice, half characters and numbers beyond 64 bits.

Knows nothing of files, lines or fields."""

import json
import re

MAX_DEPTH = 64  # of nested lists and objects; no record we know of needs more than 5
MAX_DIGITS = 19  # of an integer: what 64 bits hold


def parse_json(line: bytes):
    """The value of one line of JSON.

    Raises: ValueError, its text the reason: NaN and Infinity, numbers beyond 64 bits, a key given twice,
      nesting beyond MAX_DEPTH, text that is not UTF-8 or holds half a character.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 (byte {line[error.start]:#04x} at position {error.start + 1})"
        ) from error
    start = len(text) - len(text.lstrip(" \t\r\n"))
    value, end = decode_at(text, start)
    if text[end:].strip(" \t\r\n"):
        raise ValueError(f"not JSON (text after the end of the value, column {end + 1})")
    if reason := unusable(value):
        raise ValueError(reason)
    return value


def decode_at(text: str, start: int):
    """(value, where it ends) of the JSON that starts at `start`. Raises ValueError."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"not JSON ({error.msg}, {where})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; 64 bits hold {MAX_DIGITS}")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return fields


_DECODER = json.JSONDecoder(
    parse_int=_integer, parse_float=_float, parse_constant=_constant, object_pairs_hook=_object
)


def unusable(value) -> str | None:
    """Why a parsed value cannot be used, None where it can."""
    # A stack of our own: the value may be nested as deeply as Python's reader allows.
    stack = [(value, 1)]
    while stack:
        value, depth = stack.pop()
        if depth > MAX_DEPTH:
            return f"nested more than {MAX_DEPTH} deep"
        if isinstance(value, str):
            if not value.isascii() and _SURROGATE.search(value):
                return "holds a lone surrogate (half a character, such as \\ud83d)"
        elif isinstance(value, dict):
            stack += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list):
            stack += [(inner, depth + 1) for inner in value]
    return None


_SURROGATE = re.compile("[\ud800-\udfff]")


def kind_of(value) -> str:
    kinds = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", dict: "object"}
    return kinds.get(type(value), "null")
