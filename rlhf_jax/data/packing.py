"""Packing: examples joined into rows of one length, so that short ones do not pay for the longest.

Best-fit decreasing: each example, the longest first, goes where it leaves the least room (Johnson et al. 1974; for
language models Ding et al. 2024, arXiv:2404.10830). That takes at most 11/9 of the fewest rows possible and a few,
and no example is cut. Rows are formed once, from the examples and the row length alone, and whole rows are shuffled,
so that a batch stays a function of its position; forming them anew each epoch would change no more than which examples
share a step, since none reads another. Knows token ids; nothing of text or models."""

import bisect
import itertools
import math
from collections.abc import Sequence

import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.types import GroupedBatch, Lanes

Example = tuple[list[int], list[list[int]]]  # (prompt ids, [completion ids]): a group of one completion


def pieces(ids: Sequence[int], length: int) -> list[Example]:
    """A text as examples of at most `length` tokens, of which the first is the prompt: it is read, not learned.

    A piece begins with the last token of the one before, so that every token but the first of the text is learned
    exactly once. A text of one token teaches nothing and gives no piece.
    """
    if length < 2:
        raise InputError(f"Pieces of {length} tokens have nothing to learn; expected 2 or more.")
    starts = range(0, len(ids) - 1, length - 1)
    return [([ids[start]], [list(ids[start + 1 : start + length])]) for start in starts]


def lanes(lengths: np.ndarray, longest: int) -> Lanes | None:
    """Where the completions of each prompt stand, in as few slots as one of a few shapes allows.

    Lanes are a quarter, half, three quarters or all of the longest wide, and 1, 2, 3, 4, 6, 8, 12, ... of them: so runs
    meet few shapes, whatever is drawn. Each completion has a slot more than tokens, for the end token that a reward
    model reads after one that was cut.

    Args:
      lengths: [B, G] tokens. longest: that a completion may be.
    Returns: None if they would take no less than G rows of `longest`.
    """
    B, G = lengths.shape
    best = None
    for width in sorted({-(-longest * quarter // 4) + 1 for quarter in (1, 2, 3, 4)}):
        if lengths.max() + 1 > width:
            continue
        rows = [fit((of_prompt + 1).tolist(), width) for of_prompt in lengths]
        most = max(len(lane) for lane in rows)
        power = 1 << (most - 1).bit_length()
        count = min(3 * power // 4 if most <= 3 * power // 4 else power, G)
        if best is None or count * width < math.prod(best[1]):
            best = rows, (count, width)
    if best is None or math.prod(best[1]) >= G * longest:
        return None
    start = np.zeros((B, G), np.int32)
    for b, of_prompt in enumerate(best[0]):
        for number, lane in enumerate(of_prompt):
            slots = np.cumsum([0, *(lengths[b, lane[:-1]] + 1)])
            start[b, lane] = number * best[1][1] + slots
    return Lanes(start, best[1])


def fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in rows whose lengths add up to at most `capacity`, by best-fit decreasing.

    Each index is in one row. Equal lengths keep their order, so that the rows depend on the arguments alone.
    Raises: InputError if a length is more than the capacity.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[list[int]]] = {}  # tokens left -> rows with as many
    rooms: list[int] = []  # its keys, sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise InputError(
                f"Example {index} has {length} tokens, more than a row of {capacity}. Cut it first."
            )
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = [], capacity
            rows.append(row)
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        row.append(index)
        if room - length not in with_room:
            with_room[room - length] = []
            bisect.insort(rooms, room - length)
        with_room[room - length].append(row)
    return rows


def pack(examples: Sequence[Example], row_tokens: int) -> list[list[Example]]:
    """Examples in rows of at most `row_tokens` tokens, every example once."""
    return [[examples[i] for i in row] for row in fit([_length(e) for e in examples], row_tokens)]


def fill_fraction(rows: Sequence[Sequence[Example]], row_tokens: int) -> float:
    """Tokens in the rows, of those that would fit."""
    return sum(map(_length, itertools.chain(*rows))) / (len(rows) * row_tokens)


def batch(
    rows: Sequence[Sequence[Example]], *, row_tokens: int, pad_id: int, batch_size: int | None = None
) -> GroupedBatch:
    """A GroupedBatch of numpy arrays, [B, 1, row_tokens]: a row is one completion of a prompt of one masked token.

    Everything stands in the completion, so `segments` tells the examples of a row apart, from 1 on and 0 in the
    padding at its end, and `completion_mask` is 1 on the tokens that are learned: no prompt, no padding, never an
    example's first token, which nothing predicts. With `batch_size`, rows of weight 0 without a token fill it up.
    """
    size = len(rows) if batch_size is None else batch_size
    if not 0 < len(rows) <= size:
        raise InputError(f"{len(rows)} rows do not make a batch of {batch_size or 'any size'}.")
    ids = np.full((size, 1, row_tokens), pad_id, np.int32)
    mask, segments = np.zeros_like(ids), np.zeros_like(ids)
    for i, row in enumerate(rows):
        start = 0
        for number, (prompt, (completion,)) in enumerate(row, 1):
            stop = start + len(prompt) + len(completion)
            if stop > row_tokens:
                raise InputError(f"Row {i} has at least {stop} tokens, more than {row_tokens}.")
            ids[i, 0, start:stop] = [*prompt, *completion]
            mask[i, 0, start + max(len(prompt), 1) : stop] = 1
            segments[i, 0, start:stop] = number
            start = stop
    weights = (np.arange(size) < len(rows)).astype(np.float32)[:, None]
    nothing = np.zeros((size, 1), np.int32)
    return GroupedBatch(nothing + pad_id, nothing, ids, mask, weights=weights, segments=segments)


def _length(example: Example) -> int:
    prompt, completions = example
    if len(completions) != 1:
        raise InputError(f"An example has {len(completions)} completions; only single ones can be packed.")
    return len(prompt) + len(completions[0])
