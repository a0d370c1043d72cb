"""Texts through a decoder in batches of few shapes: one compiled program for each length of prompt and completion."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rlhf_jax.data import batching
from rlhf_jax.parallel import sharding

SMALLEST = 16  # tokens; lengths are padded to powers of two from here


def in_batches(
    groups: Sequence[tuple], *, batch_size: int, pad_id: int, mesh=None
) -> Iterator[tuple[list[int], object]]:
    """(indices into groups, GroupedBatch of `batch_size` prompts) until all groups were there, like with like.

    Args:
      groups: (prompt ids, ids of each completion); numbers of completions may differ: rows without tokens fill up.
      batch_size: prompts; on a mesh rounded up to what it can split.
    """
    if mesh is not None:
        ways = sharding.batch_ways(mesh)
        batch_size = -(-batch_size // ways) * ways
    size = lambda n: SMALLEST * 2 ** max(0, int(np.ceil(np.log2(max(n, 1) / SMALLEST))))
    longest = lambda group: max(len(ids) for ids in group[1])
    order = sorted(range(len(groups)), key=lambda i: (len(groups[i][0]), longest(groups[i])))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        G = max(len(groups[i][1]) for i in indices)
        filled = [[*groups[i][1], *[[]] * (G - len(groups[i][1]))] for i in indices]
        batch = batching.group(
            [groups[i][0] for i in indices],
            filled,
            prompt_length=size(max(len(groups[i][0]) for i in indices)),
            completion_length=size(max(longest(groups[i]) for i in indices)),
            pad_id=pad_id,
            batch_size=batch_size,
        )
        yield indices, batch if mesh is None else sharding.put_batch(batch, mesh)


def answered(groups: Sequence[tuple], forward: Callable, **how) -> list[np.ndarray]:
    """forward(batch) -> [B, G], over all groups: one array of its own length each, in order."""
    found = [None] * len(groups)
    for indices, batch in in_batches(groups, **how):
        rows = np.asarray(forward(batch), np.float32)
        for row, i in zip(rows, indices, strict=False):
            found[i] = row[: len(groups[i][1])]
    return found
