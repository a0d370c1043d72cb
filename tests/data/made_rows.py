"""Rows as sources.py gives them, and what a reader says of rows that it refuses."""

import pytest

from rlhf_jax.data.sources import Row
from rlhf_jax.errors import InputError


def rows(*fields, source="p.jsonl", untyped=False):
    return [Row(source, line, one, untyped) for line, one in enumerate(fields, 1)]


def refused(reader, *fields, **options):
    with pytest.raises(InputError) as error:
        reader(rows(*fields, **options))
    return str(error.value)


def changed(value, *path_and_new):
    """A copy of nested dicts and lists with one place changed: changed(row, "answers", 0, "text", new)."""
    *path, new = path_and_new
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]] if len(path) > 1 else None, *path[1:], new)
    return copy
