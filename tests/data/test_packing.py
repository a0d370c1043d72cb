"""Rows of examples: every example once, none cut, as full as best-fit decreasing makes them; texts in pieces."""

import math

import numpy as np
import pytest

from rlhf_jax.data import packing
from rlhf_jax.data.batching import ResumableData
from rlhf_jax.errors import InputError


def test_fit_by_hand():
    # 7, then 6 in a row of its own; 4 fills that of 6, the first 3 that of 7; the other 3 and the 2 share a third.
    assert packing.fit([3, 7, 2, 6, 3, 4], 10) == [[1, 0], [3, 5], [4, 2]]
    # First-fit would put the 1 beside the 7; it fits best beside 5 and 4.
    assert packing.fit([7, 5, 4, 1], 10) == [[0], [1, 2, 3]]
    assert packing.fit([], 4) == [] and packing.fit([4, 4], 4) == [[0], [1]]
    with pytest.raises(InputError, match="Example 1 has 5 tokens, more than a row of 4"):
        packing.fit([1, 5], 4)


def best_fit(lengths, capacity):
    """Fullest row that still has room, by looking at all of them; how full each row is."""
    used = []
    for length in sorted(lengths, reverse=True):
        best = max((u for u in used if u + length <= capacity), default=None)
        if best is not None:
            used.remove(best)
        used.append((best or 0) + length)
    return sorted(used)


@pytest.mark.parametrize("seed", range(5))
def test_fit_is_best_fit_decreasing_with_every_index_once(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 60))
    lengths = np.minimum(rng.geometric(0.15, 200), capacity).tolist()
    rows = packing.fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert sorted(sum(lengths[i] for i in row) for row in rows) == best_fit(lengths, capacity)
    assert len(rows) <= 11 / 9 * math.ceil(sum(lengths) / capacity) + 4
    assert rows == packing.fit(lengths, capacity)


def test_a_batch_by_hand():
    examples = [([1], [[2, 3]]), ([4, 5], [[6]]), ([], [[7, 8]]), ([9, 9, 9], [[9, 9]])]
    rows = packing.pack(examples, 6)
    assert rows == [[examples[3]], [examples[0], examples[1]], [examples[2]]]
    assert packing.fill_fraction(rows, 6) == 13 / 18
    batch = packing.batch(rows[1:], row_tokens=6, pad_id=0, batch_size=3)
    np.testing.assert_array_equal(
        batch.completion_ids[:, 0], [[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0], [0] * 6]
    )
    np.testing.assert_array_equal(batch.segments[:, 0], [[1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0], [0] * 6])
    # Completion tokens alone, and of an example without a prompt not the first, which nothing predicts.
    np.testing.assert_array_equal(
        batch.completion_mask[:, 0], [[0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0], [0] * 6]
    )
    np.testing.assert_array_equal(batch.weights, [[1], [1], [0]])
    assert batch.prompt_ids.shape == (3, 1) and not batch.prompt_mask.any()
    for wrong in ([], rows):
        with pytest.raises(InputError, match=f"{len(wrong)} rows do not make a batch of 2"):
            packing.batch(wrong, row_tokens=6, pad_id=0, batch_size=2)
    with pytest.raises(InputError, match="Row 0 has at least 6 tokens, more than 5"):
        packing.batch(rows[1:], row_tokens=5, pad_id=0)
    with pytest.raises(InputError, match="2 completions"):
        packing.pack([([1], [[2], [3]])], 6)


@pytest.mark.parametrize("size", [2, 3, 10, 11, 12, 29, 30, 31])
def test_every_token_of_a_text_but_the_first_is_learned_once(size):
    ids = list(range(100, 100 + size))
    made = packing.pieces(ids, 11)
    assert [i for _, (completion,) in made for i in completion] == ids[1:]
    assert all(len(prompt) == 1 and 1 <= len(completion) <= 10 for prompt, (completion,) in made)
    assert all(completion[0] == prompt[0] + 1 for prompt, (completion,) in made)  # read in its context
    assert all(len(completion) == 10 for _, (completion,) in made[:-1])


def test_texts_with_nothing_to_learn():
    assert packing.pieces([5], 4) == [] and packing.pieces([], 4) == []
    with pytest.raises(InputError, match="Pieces of 1 tokens"):
        packing.pieces([1, 2, 3], 1)


def test_another_row_length_is_another_fingerprint():
    examples = [([1], [[2] * n]) for n in (5, 4, 3)]
    prints = [
        ResumableData(packing.pack(examples, n), batch_size=2, seed=0).fingerprint()["all_records"]
        for n in (6, 12)
    ]
    assert prints[0] != prints[1]
