"""What one field of a row may hold, read strictly: a value that merely resembles what is meant is refused.

Knows no formats: a reader of a format puts these together."""

import math
import re
import reprlib

from rlhf_jax.data.sources import Row

NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+")


class FieldError(ValueError):
    """A field that does not hold what its format says."""

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason


def text(row: Row, field: str) -> str:
    return text_of(row.fields[field], field)


def text_of(value, field: str, what: str = "") -> str:
    """value: of `field` itself, or of the part of it that `what` names ("completion 2: ")."""
    if not isinstance(value, str):
        raise FieldError(field, f"{what}is {shown(value)}; expected a string")
    if not value.strip():
        raise FieldError(field, f"{what}is empty; expected text")
    return value


def choice(row: Row, field: str) -> int:
    value = row.fields[field]
    if row.untyped and value in ("0", "1"):
        value = int(value)
    if type(value) is not int or value not in (
        0,
        1,
    ):  # True and 1.0 equal 1, but somebody meant something else
        raise FieldError(field, f"is {shown(value)}; expected 0 or 1, the index of the better candidate")
    return value


def boolean(row: Row, field: str) -> bool:
    value = row.fields[field]
    if row.untyped and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if type(value) is not bool:
        raise FieldError(field, f"is {shown(value)}; expected true or false")
    return value


def probability(row: Row, field: str) -> float | None:
    value = row.fields.get(field)
    if row.untyped:
        value = float(value) if NUMBER.fullmatch(value or "") else value or None
    if value is not None and (type(value) not in (int, float) or not 0.0 <= value <= 1.0):
        raise FieldError(
            field, f"is {shown(value)}; expected a probability between 0 and 1, or no such field"
        )
    return value


def rating(value, field: str, what: str = "", digits: bool = False) -> float | None:
    """A number; None for null, which says that nobody rated. digits: numbers may also come as their digits, and no
    rating as "N/A" or nothing."""
    if digits and isinstance(value, str):
        value = value.strip()
        if value in ("", "N/A"):
            return None
        value = float(value) if NUMBER.fullmatch(value) else value
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):
        raise FieldError(
            field, f"{what}is {shown(value)}; expected a number, or null where there is no rating"
        )
    return float(value)


def shown(value) -> str:
    """A short repr: control characters and half characters in it are escaped."""
    return "null" if value is None else _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong, _SHORT.maxlevel, _SHORT.maxlist = 60, 60, 60, 3, 4
