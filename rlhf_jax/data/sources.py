"""Rows out of files and data sets: JSON lines, JSON arrays, CSV, parquet, Hugging Face and TFDS names.

A line that cannot be read is named (file, line, reason) and never takes its neighbours with it. Knows nothing
of prompts, pairs or tokens: a row is a dict of fields."""

import csv
import dataclasses
import glob
import gzip
import itertools
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator

from rlhf_jax.data.strict_json import decode_at, kind_of, parse_json, unusable
from rlhf_jax.errors import InputError

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGED = {name: os.path.join(HERE, f"{name}.jsonl") for name in ("openings", "arithmetic", "constitution")}
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")
HUB_NAME = re.compile(
    r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<config>[\w.-]+))?(#(?P<split>[\w.\[\]:%+-]+))?"
)
MAX_CSV_VALUE = 2**24  # characters; the module's own limit, 131072, is less than a long document
SHOWN = 10  # bad records that a message spells out


@dataclasses.dataclass(frozen=True)
class Row:
    """One record as it was found."""

    source: str  # path or data set name
    line: int  # from 1: the line of a text file, else the number of the record
    fields: dict
    untyped: bool = False  # from CSV, where a number is its digits


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """One record that was left out, and why."""

    source: str
    line: int
    field: str | None  # None where the line as a whole cannot be read
    reason: str

    def __str__(self):
        where = f"{self.source}, line {self.line}: "
        return where + (self.reason if self.field is None else f"{self.field!r} {self.reason}")


def check_bad_records(bad: list[BadRecord], total: int, max_bad_records: float = 0.0):
    """Raises InputError where `bad` is more than the allowed fraction of `total`; below it, logs them."""
    if not 0.0 <= max_bad_records <= 1.0:  # written so that NaN fails too
        raise InputError(f"max_bad_records is {max_bad_records!r}; expected a fraction between 0 and 1.")
    if not bad:
        return
    shown = [str(record) for record in bad[:SHOWN]]
    if len(bad) > SHOWN:
        shown.append(f"... and {len(bad) - SHOWN} more")
    if len(bad) > max_bad_records * total:
        which = "this line; the other lines of the file" if len(bad) == 1 else "these lines; the other lines"
        counted = "" if len(bad) == 1 else f"{len(bad)} of {total} records cannot be used:\n"
        raise InputError(
            f"{counted}{chr(10).join(shown)}\nCorrect or delete {which} are not affected. Or allow a "
            f"fraction of bad records: max_bad_records, now {max_bad_records:g}; here {len(bad) / total:.2g}."
        )
    logging.getLogger("rlhf_jax.data").warning(
        "left out %d of %d records:\n%s", len(bad), total, "\n".join(shown)
    )


def read_rows(
    spec: str, *, split: str = "train", limit: int | None = None, max_bad_records: float = 0.0
) -> list[Row]:
    """All rows that `spec` names, in the order of the file names and lines.

    Args:
      spec: a path or a glob (** reaches into folders) of .jsonl, .json, .csv or .parquet files (.gz may
        follow .jsonl and .json), several separated by commas; `org/name` or `org/name:config` for a Hugging
        Face data set; `tfds:name` for TensorFlow Datasets, or `tfds:/folder` for one already prepared as
        array_record; `packaged:name` for a file of the package.
      split: of a Hugging Face or TFDS data set; files have none.
      limit: stop after so many good rows.
      max_bad_records: the fraction of unreadable records to put up with; more is an InputError.
    Returns: at least one row.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InputError(f"limit is {limit!r}; expected a positive number of rows, or None for all.")
    if not isinstance(spec, str) or not spec.strip():
        raise InputError(f"The data path is {spec!r}; expected a file, a glob or the name of a data set.")
    rows, bad = [], []
    for record in _records(spec.strip(), split):
        if isinstance(record, BadRecord):
            bad.append(record)
        else:
            rows.append(record)
        if len(rows) == limit:
            break
    check_bad_records(bad, len(rows) + len(bad), max_bad_records)
    if not rows:
        raise InputError(f"{spec} holds no records.")
    return rows


def openings() -> list[Row]:
    """The packaged prompts: openings of reviews and everyday sentences, in an order without meaning."""
    return read_rows("packaged:openings")


def _records(spec: str, split: str) -> Iterator[Row | BadRecord]:
    if spec.startswith("tfds:"):
        name, _, own = spec.removeprefix("tfds:").partition("#")
        yield from _tfds(spec, name, own or split)
    elif spec.startswith("packaged:"):
        name = spec.removeprefix("packaged:")
        if name not in PACKAGED:
            raise InputError(
                f"{spec}: there is no such packaged file; expected one of {', '.join(PACKAGED)}."
            )
        yield from _file(PACKAGED[name])
    elif (hub := HUB_NAME.fullmatch(spec)) and not spec.endswith(SUFFIXES) and not os.path.exists(spec):
        yield from _hub(spec, hub["path"], hub["config"], hub["split"] or split)
    else:
        for path in _paths(spec):
            yield from _file(path)


def _paths(spec: str) -> list[str]:
    """The files of a comma-separated list of paths and globs, each once, globs sorted."""
    paths = []
    patterns = [spec] if os.path.exists(spec) else [part.strip() for part in spec.split(",") if part.strip()]
    if not patterns:
        raise InputError(f"The data path {spec!r} names no file.")
    for pattern in patterns:
        if "://" in pattern:
            raise InputError(f"{pattern} is not a local file. Copy it to this machine and give that path.")
        pattern = os.path.expanduser(pattern)
        if os.path.isdir(pattern):
            example = os.path.join(pattern, "*.jsonl")
            raise InputError(f"{pattern} is a directory; name its files, for example {example}")
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if not os.path.isdir(path)]
        if not found:
            raise InputError(f"{pattern}: {_nothing_there(pattern)}")
        for path in found:
            if not path.endswith(SUFFIXES):
                raise InputError(f"{path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}.")
        paths += found
    return list(dict.fromkeys(paths))


def _nothing_there(pattern: str) -> str:
    what = "no file matches this pattern" if glob.has_magic(pattern) else "no such file"
    nearest = os.path.dirname(os.path.abspath(pattern))
    while glob.has_magic(nearest) or not os.path.isdir(nearest):
        nearest = os.path.dirname(nearest)
    return f"{what}. The nearest directory that exists is {nearest}"


# --- files


def _file(path: str) -> Iterator[Row | BadRecord]:
    if path.endswith(".parquet"):
        yield from _parquet(path)
        return
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            if path.endswith(".csv"):
                yield from _csv(path, file.read())
            elif path.endswith((".jsonl", ".jsonl.gz")):
                yield from _json_lines(path, file)
            else:
                data = file.read()
                as_array = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
                # Many a .json file holds one object a line.
                yield from _json_array(path, data) if as_array else _json_lines(path, data.split(b"\n"))
    except (OSError, EOFError, zlib.error) as error:  # a gzip file cut short is an EOFError
        raise InputError(f"{path}: cannot be read ({error}).") from error


def _json_lines(path: str, lines: Iterable[bytes]) -> Iterator[Row | BadRecord]:
    # Binary, split at b"\n" alone: splitlines() would cut a record at U+2028, U+0085 or a lone CR.
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
            _refuse_pointer(path, line)
        if not line.strip():
            continue
        try:
            value = parse_json(line)
            if not isinstance(value, dict):
                raise ValueError(f'is a JSON {kind_of(value)}, expected an object such as {{"field": ...}}')
        except ValueError as error:
            yield BadRecord(path, number, None, str(error))
        else:
            yield Row(path, number, value)


def _json_array(path: str, data: bytes) -> Iterator[Row | BadRecord]:
    """Elements one by one, so that each has its line and a wrong one stands alone."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}).") from error
    blank = re.compile(r"[ \t\n\r]*")
    place, line, counted = blank.match(text).end() + 1, 1, 0  # after the opening bracket
    for first in itertools.chain([True], itertools.repeat(False)):
        place = blank.match(text, place).end()
        if first and text[place : place + 1] == "]":
            place += 1
            break
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decode_at(text, place)
            if not isinstance(value, dict):
                yield BadRecord(path, line, None, f"is a JSON {kind_of(value)}, expected an object")
            elif reason := unusable(value):
                yield BadRecord(path, line, None, reason)
            else:
                yield Row(path, line, value)
        except ValueError as error:
            raise InputError(
                f"{path}, the record from line {line}: {error}. The array cannot be read beyond it; "
                "correct it, or write one record a line (.jsonl)."
            ) from error
        place = blank.match(text, place).end() + 1
        if text[place - 1 : place] == "]":
            break
        if text[place - 1 : place] != ",":
            line += text.count("\n", counted, place)
            raise InputError(f"{path}, line {line}: not a JSON array (no ',' or ']' after a record).")
    if text[place:].strip(" \t\n\r"):
        line = text.count("\n", 0, place) + 1
        raise InputError(f"{path}, line {line}: text after the end of the JSON array.")


def _csv(path: str, data: bytes) -> Iterator[Row | BadRecord]:
    text = data.decode("utf-8-sig", errors="surrogateescape")
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CSV_VALUE))
    reader = csv.reader(_csv_lines(text), strict=True)
    names, start = None, 1
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            # The reader has lost its place: what follows may be read as part of a quotation.
            raise InputError(
                f"{path}, line {start}: not CSV ({error}). Check the quotation marks from there."
            ) from error
        if values is None:
            return
        line, start = start, reader.line_num + 1
        if not values:
            continue
        if names is None:
            if len(set(values)) < len(values) or not all(values):
                raise InputError(
                    f"{path}, line {line}: the header must name each column once; it is {values!r}."
                )
            names = values
        elif len(values) != len(names):
            yield BadRecord(path, line, None, f"{len(values)} values for {len(names)} columns")
        elif reason := unusable(values):
            yield BadRecord(path, line, None, "not UTF-8" if "surrogate" in reason else reason)
        else:
            yield Row(path, line, dict(zip(names, values, strict=True)), untyped=True)


def _csv_lines(text: str) -> Iterator[str]:
    """Lines with their ends, cut at \\n alone."""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _parquet(path: str) -> Iterator[Row | BadRecord]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield _decoded(path, number, fields)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{path}: no readable parquet file after record {number} ({_first_line(error)})."
        ) from error


# --- data sets by name


def _hub(spec: str, path: str, config: str | None, split: str) -> Iterator[Row | BadRecord]:
    import datasets

    try:
        data = datasets.load_dataset(path, config, split=split)
    except Exception as error:  # of many classes: connection, missing, split, config, generation
        raise InputError(
            f"{spec}: no such file, and the Hugging Face data set cannot be loaded, split {split!r} "
            f"({type(error).__name__}: {_first_line(error)}). Without a network only data sets in the local "
            "cache can be read (HF_HUB_OFFLINE=1 skips the attempts to connect). On a machine with one, "
            f"`datasets.load_dataset({path!r}, {config!r}, split={split!r}).to_json('data.jsonl')` writes a "
            "file to copy here."
        ) from error
    for number in range(len(data)):
        yield _decoded(spec, number + 1, data[number])


def _tfds(spec: str, name: str, split: str) -> Iterator[Row | BadRecord]:
    import tensorflow_datasets as tfds

    try:
        if os.path.isdir(os.path.expanduser(name)):
            builder = tfds.builder_from_directory(os.path.expanduser(name))
        else:
            builder = tfds.builder(name, file_format="array_record", try_gcs=False)
        data = builder.as_data_source(split=split)  # unlike as_dataset, needs no TensorFlow
    except Exception as error:  # of many classes: not registered, not prepared, no such split
        raise InputError(
            f"{spec}: split {split!r} cannot be read ({type(error).__name__}: {_first_line(error)}). Prepare "
            f"it once with `tensorflow_datasets.builder({name!r}, file_format='array_record')"
            ".download_and_prepare()`, and set "
            "TFDS_DATA_DIR if it is not in ~/tensorflow_datasets."
        ) from error
    for number in range(len(data)):
        yield _decoded(spec, number + 1, data[number])


def _decoded(source: str, number: int, fields: dict) -> Row | BadRecord:
    """Text features come as bytes and numbers as numpy scalars; a row holds neither."""
    try:
        fields = _plain(fields)
    except UnicodeDecodeError:
        return BadRecord(source, number, None, "not UTF-8")
    if reason := unusable(fields):
        return BadRecord(source, number, None, reason)
    return Row(source, number, fields)


def _plain(value):
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if hasattr(value, "tolist"):  # numpy, scalars included
        value = value.tolist()
        return _plain(value) if isinstance(value, (list, bytes)) else value
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _refuse_pointer(path: str, line: bytes):
    if line.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the data. Fetch the data with `git lfs pull`.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]
