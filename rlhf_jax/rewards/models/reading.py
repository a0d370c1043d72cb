"""Texts through a model in batches of few shapes: lengths are padded to powers of two, like goes with like."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from rlhf_jax.data import batching
from rlhf_jax.parallel import hosts, sharding
from rlhf_jax.parallel import mesh as meshes

SMALLEST = 16  # tokens


def groups(
    forward: Callable, asked: Sequence[tuple], *, batch_size: int, pad_id: int, mesh=None
) -> list[np.ndarray]:
    """forward(GroupedBatch) -> [B, G], over prompts with their completions: one array a prompt, in order.

    Args:
      asked: (prompt ids, ids of each completion); numbers of completions may differ: rows without tokens fill up.
      batch_size: prompts; on a mesh rounded up to what it can split.
    """
    longest = lambda group: max(len(ids) for ids in group[1])

    def batch_of(chosen, size):
        G = max(len(completions) for _, completions in chosen)
        return batching.group(
            [prompt for prompt, _ in chosen],
            [[*completions, *[[]] * (G - len(completions))] for _, completions in chosen],
            prompt_length=_bucket(max(len(prompt) for prompt, _ in chosen)),
            completion_length=_bucket(max(map(longest, chosen))),
            pad_id=pad_id,
            batch_size=size,
        )

    found = _batches(
        forward, asked, lambda group: (len(group[0]), longest(group)), batch_of, batch_size, mesh
    )
    return [row[: len(group[1])] for row, group in zip(found, asked, strict=True)]


def sequences(
    forward: Callable, asked: Sequence, *, batch_size: int, pad_id: int, mesh=None
) -> list[np.ndarray]:
    """forward((ids, mask, type_ids)), each [B, T] int32, -> [B, ...], over (ids, type_ids) of sequences, in order."""

    def batch_of(chosen, size):
        T = _bucket(max(len(ids) for ids, _ in chosen))
        rows = [*chosen, *chosen[-1:] * (size - len(chosen))]
        ids, mask, types = (
            np.full((size, T), pad_id, np.int32),
            np.zeros((size, T), np.int32),
            np.zeros((size, T), np.int32),
        )
        for i, (one, of_type) in enumerate(rows):
            ids[i, : len(one)], mask[i, : len(one)], types[i, : len(one)] = one, 1, of_type
        return ids, mask, types

    return _batches(forward, asked, lambda one: len(one[0]), batch_of, batch_size, mesh)


def _batches(forward, asked, size_of, batch_of, batch_size, mesh):
    if mesh is not None:
        ways = sharding.batch_ways(mesh)
        batch_size = -(-batch_size // ways) * ways
    found = [None] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: size_of(asked[i]))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = batch_of([asked[i] for i in indices], batch_size)
        if mesh is None:
            scores = forward(batch)
        else:
            with meshes.activate(mesh):
                scores = forward(sharding.put_batch(batch, mesh))
        for i, row in zip(indices, np.asarray(hosts.gather(scores), np.float32), strict=False):
            found[i] = row
    return found


def _bucket(length: int) -> int:
    return SMALLEST * 2 ** max(0, math.ceil(math.log2(max(length, 1) / SMALLEST)))
