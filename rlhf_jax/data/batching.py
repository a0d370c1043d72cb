"""Ids to padded arrays, and records in an order that any step can be asked for.

Nothing here remembers where it is: a batch is a function of its position, so a resumed run needs one number
and the assurance (a fingerprint) that the data behind it are the same. Knows nothing of text or files.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.types import GroupedBatch, SequenceBatch

# --- arrays


def pad_prompts(
    prompt_ids: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """B lists of ids, padded on the left: (ids, mask), both [B, length] int32."""
    ids = np.full((len(prompt_ids), length), pad_id, np.int32)
    mask = np.zeros_like(ids)
    for row, one in enumerate(prompt_ids):
        _check_length("prompt", row, len(one), length)
        if len(one):  # [length - 0:] would be the whole row
            ids[row, length - len(one) :] = one
            mask[row, length - len(one) :] = 1
    return ids, mask


def pad_completions(
    completion_ids: Sequence[Sequence[Sequence[int]]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """B lists of G lists of ids, padded on the right: (ids, mask), both [B, G, length] int32."""
    sizes = sorted({len(of_prompt) for of_prompt in completion_ids})
    if len(sizes) > 1:
        raise InputError(f"Prompts of one batch have {sizes} completions; all need the same number.")
    ids = np.full((len(completion_ids), *(sizes or [0]), length), pad_id, np.int32)
    mask = np.zeros_like(ids)
    for row, of_prompt in enumerate(completion_ids):
        for column, one in enumerate(of_prompt):
            _check_length("completion", row, len(one), length)
            ids[row, column, : len(one)] = one
            mask[row, column, : len(one)] = 1
    return ids, mask


def group(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[Sequence[int]]],
    *,
    prompt_length: int,
    completion_length: int,
    pad_id: int,
    batch_size: int | None = None,
) -> GroupedBatch:
    """A GroupedBatch of numpy arrays from B prompts with G completions each, all of weight 1.

    With `batch_size`, rows of weight 0 and no completion token fill it up. Their prompt is the last one
    again: a row without any token would have nothing to attend to.
    """
    if len(prompt_ids) != len(completion_ids):
        raise InputError(f"{len(prompt_ids)} prompts, but completions for {len(completion_ids)}.")
    rows, missing = len(prompt_ids), 0 if batch_size is None else batch_size - len(prompt_ids)
    if rows == 0 or missing < 0:
        raise InputError(f"{rows} prompts do not make a batch of {batch_size or 'any size'}.")
    prompts, prompt_mask = pad_prompts([*prompt_ids, *[prompt_ids[-1]] * missing], prompt_length, pad_id)
    nothing = [[]] * len(completion_ids[-1])
    completions, mask = pad_completions([*completion_ids, *[nothing] * missing], completion_length, pad_id)
    weights = np.ones(completions.shape[:2], np.float32)
    weights[rows:] = 0.0
    return GroupedBatch(prompts, prompt_mask, completions, mask, weights=weights)


def bucket(lengths: Sequence[int], largest: Sequence[int], buckets: int) -> tuple[int, ...]:
    """The first of 1/n, 2/n, ... of `largest` that holds `lengths`: few different shapes, so few compilations."""
    parts = max(-(-n * buckets // max(most, 1)) for n, most in zip(lengths, largest, strict=True))
    if parts > buckets:
        raise InputError(f"{tuple(lengths)} tokens do not fit the largest length, {tuple(largest)}.")
    return tuple(-(-most * max(parts, 1) // buckets) for most in largest)


def _check_length(what: str, row: int, found: int, length: int):
    if found > length:
        raise InputError(
            f"The {what} of row {row} has {found} tokens, more than {length}. Truncate it first."
        )


# --- order


class ResumableData:
    """Records shuffled anew each epoch, in batches that any position can be asked for.

    The order is Grain's. Each epoch has every record once; a batch may hold the end of one epoch and the
    beginning of the next, and so be larger than the data.
    """

    def __init__(
        self,
        records: Sequence,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        sort_batches: int = 1,
        length: Callable = len,
        identity: dict | None = None,
    ):
        """
        Args:
          records: dataclasses, dicts, lists or arrays; read, never changed.
          batch_size: of all hosts together.
          seed: of the order.
          shuffle: False keeps the order of `records`, in each epoch.
          sort_batches: the records of so many batches are dealt anew, those of about the same length(record) together;
            in which order these batches come is random. 1: as shuffled.
          identity: what else must be the same when a run resumes, as JSON values: maximum lengths,
            fingerprint of the tokenizer, chat template.
        """
        import grain

        if len(records) == 0:
            raise InputError("There are no records to make batches of.")
        if type(batch_size) is not int or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}; expected a positive number of records.")
        if type(seed) is not int or seed < 0:
            raise InputError(f"The seed of the data is {seed!r}; expected a number from 0.")
        self.records, self.batch_size = records, batch_size
        # .seed() and not shuffle(seed=): that adds the epoch to the seed, so that seed 1 would begin with
        # epoch 1 of seed 0.
        order = grain.MapDataset.range(len(records)).seed(seed)
        self._order = (order.shuffle() if shuffle else order).repeat()
        self._seed, self._sort_batches, self._length, self._sorted = seed, sort_batches, length, (-1, [])
        sorting = {"sort_batches": sort_batches} if sort_batches > 1 else {}
        self._identity = {"seed": seed, "shuffle": shuffle} | sorting | (identity or {})

    def batch(self, position: int) -> list:
        """The records of one batch, a pure function of `position`, which counts batches from 0."""
        return [self.records[i] for i in self.indices(position)]

    def indices(self, position: int) -> list[int]:
        """Where those stand in `records`, for what is kept beside them."""
        if self._sort_batches > 1:
            return self._of_sorted(*divmod(position, self._sort_batches))
        return self._shuffled(position, self.batch_size)

    def _shuffled(self, part: int, size: int) -> list[int]:
        return [int(self._order[i]) for i in range(part * size, (part + 1) * size)]

    def _of_sorted(self, window: int, turn: int) -> list[int]:
        if self._sorted[0] != window:
            inside = self._shuffled(window, self.batch_size * self._sort_batches)
            self._sorted = window, sorted(inside, key=lambda i: self._length(self.records[i]))
        order = np.random.default_rng((self._seed, window)).permutation(self._sort_batches)
        first = int(order[turn]) * self.batch_size
        return self._sorted[1][first : first + self.batch_size]

    def batches(self, position: int = 0) -> Iterator[list]:
        """Every batch from `position` on, without end."""
        while True:
            yield self.batch(position)
            position += 1

    def epoch(self, position: int) -> float:
        """How many times the data have been seen before the batch at `position`."""
        return position * self.batch_size / len(self.records)

    def fingerprint(self) -> dict:
        """What decides every batch, as JSON values, to save beside the position; see `check_fingerprint`."""
        hashes = record_hashes(self.records)
        order = [int(self._order[i]) for i in range(min(len(hashes), 1000))]
        return {
            "num_records": len(hashes),
            "first_record": hashes[0],
            "last_record": hashes[-1],
            "all_records": _digest(hashes),
            "order": _digest(order),  # would show another way of shuffling in another version of Grain
            "batch_size": self.batch_size,
            **self._identity,
        }


def sequences(records: Sequence, *, length: int, pad_id: int, batch_size: int | None = None) -> SequenceBatch:
    """Records of G (ids, type ids) each, G the same in all, as one batch; filled up to `batch_size` with rows of weight
    0 that repeat the last."""
    rows, G = max(batch_size or 0, len(records)), len(records[0])
    ids, mask, types = (np.full((rows, G, length), fill, np.int32) for fill in (pad_id, 0, 0))
    for b, record in enumerate([*records, *records[-1:] * (rows - len(records))]):
        for g, (one, of_type) in enumerate(record):
            ids[b, g, : len(one)], mask[b, g, : len(one)], types[b, g, : len(one)] = one, 1, of_type
    weights = np.repeat((np.arange(rows) < len(records))[:, None], G, axis=1).astype(np.float32)
    return SequenceBatch(ids, mask, types, weights)


def record_hashes(records: Sequence) -> list[str]:
    """One of the contents of each record."""
    return [_digest(_content(record)) for record in records]


def check_fingerprint(saved: dict, now: dict):
    """Raises InputError that lists what differs between the data of a saved run and those of now."""
    absent = "(none)"
    differing = [
        f"  {name}: saved {saved.get(name, absent)!r}, now {now.get(name, absent)!r}"
        for name in dict.fromkeys([*saved, *now])
        if saved.get(name, absent) != now.get(name, absent)
    ]
    if differing:
        listed = "\n".join(differing)
        raise InputError(
            f"The data are not those that this run began with:\n{listed}\n"
            "Going on would repeat some records and skip others. Restore the data and settings, or start "
            "in another "
            "workdir."
        )


def steps_for_epochs(num_records: int, epochs: float, batch_size: int) -> int:
    """Steps that see each of `num_records` records `epochs` times: rounded up once, at the end."""
    # Not ceil(records / batch) * epochs: batches go on across the end of an epoch.
    return int(np.ceil(num_records * epochs / batch_size))


def _content(record):
    """A record as JSON values. Where it was found (`row`) is left out: a file may move."""
    if dataclasses.is_dataclass(record):
        names = [field.name for field in dataclasses.fields(record) if field.name != "row"]
        return {name: _content(getattr(record, name)) for name in names}
    if isinstance(record, dict):
        return {str(name): _content(value) for name, value in record.items()}
    if isinstance(record, (list, tuple)):
        return [_content(value) for value in record]
    return record.tolist() if hasattr(record, "tolist") else record


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
