"""JSONL files that a run makes batch by batch, so that a killed run goes on where it was.

Each row says which batch it is of and how many rows that batch has; a batch that is not whole is made again."""

import json
import os

from rlhf_jax.errors import InputError


def append_batch(path: str, number: int, rows: list[dict]) -> None:
    """One batch at the end of the file, on disk when this returns."""
    lines = [json.dumps(row | {"batch": number, "batch_rows": len(rows)}, ensure_ascii=False) for row in rows]
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def keep_whole_batches(path: str) -> int:
    """Cut off what is torn or of a batch that is not whole; returns the number of the next batch to make."""
    if not os.path.exists(path):
        return 0
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]  # what follows the last line end is torn
    batches = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            batches.setdefault(row["batch"], []).append((row["batch_rows"], line))
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f"{path}, line {number} is damaged. Delete the file; it is made again."
            ) from None
    whole = {number: rows for number, rows in batches.items() if len(rows) == rows[0][0]}
    with open(path + ".new", "wb") as file:
        file.writelines(line + b"\n" for rows in whole.values() for _, line in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)
    return max(whole, default=-1) + 1


def finish(partial: str, final: str) -> None:
    """The file is complete: give it its name."""
    with open(partial, "a", encoding="utf-8"):  # of no batches there is none yet
        pass
    os.replace(partial, final)
