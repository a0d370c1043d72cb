"""Padding by length, every record once an epoch, and the same batches after a resume."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from rlhf_jax.data import batching
from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.sources import Row
from rlhf_jax.errors import InputError


def test_padding_sides_and_masks_come_from_lengths():
    ids, mask = batching.pad_prompts([[5, 0], [7, 8, 9], []], 3, pad_id=0)  # a real token equal to pad counts
    np.testing.assert_array_equal(ids, [[0, 5, 0], [7, 8, 9], [0, 0, 0]])
    np.testing.assert_array_equal(mask, [[0, 1, 1], [1, 1, 1], [0, 0, 0]])
    ids, mask = batching.pad_completions([[[5], [0, 2]], [[], [3, 4, 5]]], 3, pad_id=2)
    np.testing.assert_array_equal(ids, [[[5, 2, 2], [0, 2, 2]], [[2, 2, 2], [3, 4, 5]]])
    np.testing.assert_array_equal(mask, [[[1, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 1]]])
    assert ids.dtype == mask.dtype == np.int32
    with pytest.raises(InputError, match="row 1 has 4 tokens, more than 3"):
        batching.pad_prompts([[1], [1, 2, 3, 4]], 3, 0)
    with pytest.raises(InputError, match="same number"):
        batching.pad_completions([[[1]], [[1], [2]]], 3, 0)


def test_group_and_filler_rows():
    sizes = {"prompt_length": 3, "completion_length": 2, "pad_id": 9}
    batch = batching.group([[1, 2], [3]], [[[4], [5, 6]], [[7], []]], **sizes)
    assert batch.prompt_ids.shape == (2, 3) and batch.completion_ids.shape == (2, 2, 2)
    np.testing.assert_array_equal(batch.weights, np.ones((2, 2), np.float32))
    assert batch.weights.dtype == np.float32 and batch.scores is None
    filled = batching.group([[1, 2], [3]], [[[4], [5, 6]], [[7], []]], **sizes, batch_size=4)
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        np.testing.assert_array_equal(getattr(filled, name)[:2], getattr(batch, name))
    np.testing.assert_array_equal(filled.weights, [[1, 1], [1, 1], [0, 0], [0, 0]])
    assert filled.completion_mask[2:].sum() == 0 and (filled.prompt_mask[2:].sum(1) == 1).all()
    for size in (1, 0):
        with pytest.raises(InputError, match="do not make a batch"):
            batching.group([[1, 2], [3]], [[[4]], [[5]]], **sizes, batch_size=size)
    with pytest.raises(InputError, match="completions for 1"):
        batching.group([[1], [2]], [[[3]]], **sizes)


def test_a_bucket_is_the_first_part_that_holds_both():
    found = [
        batching.bucket(pair, (64, 10), 4) for pair in ((0, 0), (16, 2), (17, 2), (16, 3), (16, 6), (64, 1))
    ]
    assert found == [(16, 3), (16, 3), (32, 5), (32, 5), (48, 8), (64, 10)]
    assert batching.bucket((1, 1), (64, 10), 1) == (64, 10)
    assert batching.bucket((1, 3), (1, 3), 4) == (1, 3)
    with pytest.raises(InputError, match=r"\(65, 1\) tokens do not fit the largest length, \(64, 10\)"):
        batching.bucket((65, 1), (64, 10), 4)


def test_records_of_about_the_same_length_share_a_batch():
    rng = np.random.default_rng(0)
    records = [[i] * int(rng.integers(1, 50)) for i in range(103)]
    made = dict(batch_size=4, seed=5)
    plain, dealt = (batching.ResumableData(records, **made, sort_batches=n) for n in (1, 8))
    steps = []
    for window in range(5):  # past the end of an epoch
        batches = [dealt.indices(window * 8 + n) for n in range(8)]
        before = [i for n in range(8) for i in plain.indices(window * 8 + n)]
        assert sorted(sum(batches, [])) == sorted(before)
        ranges = [(min(sizes), max(sizes)) for sizes in ([len(records[i]) for i in b] for b in batches)]
        ordered = sorted(ranges)
        assert all(one[1] <= other[0] for one, other in zip(ordered, ordered[1:], strict=False))
        steps.append([ordered.index(one) for one in ranges])
    assert len({tuple(order) for order in steps}) == 5 and sorted(steps[0]) != steps[0]
    # A function of the position alone, asked for in any order.
    again = batching.ResumableData(records, **made, sort_batches=8)
    assert [again.indices(n) for n in (39, 3, 17)] == [dealt.indices(n) for n in (39, 3, 17)]
    with pytest.raises(InputError, match="sort_batches"):
        batching.check_fingerprint(plain.fingerprint(), dealt.fingerprint())


@pytest.mark.parametrize("count, batch_size", [(40, 9), (40, 40), (30, 64), (1, 2)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_record_once_an_epoch_and_resume_at_every_position(count, batch_size, shuffle):
    make = lambda: batching.ResumableData(list(range(count)), batch_size=batch_size, seed=3, shuffle=shuffle)
    stream, whole = make().batches(), []
    for _ in range(6):
        whole.append(next(stream))
    flat = sum(whole, [])
    assert len(flat) > count
    for start in range(0, len(flat) - count + 1, count):
        assert sorted(flat[start : start + count]) == list(range(count))
    for position in range(6):
        resumed = make().batches(position)
        assert [next(resumed) for _ in range(6 - position)] == whole[position:]


def test_epochs_and_seeds_differ_and_are_not_shifts_of_each_other():
    epochs = {
        (seed, epoch): tuple(batching.ResumableData(range(50), batch_size=50, seed=seed).batch(epoch))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(set(epochs.values())) == 16  # seed 1 does not begin with the second epoch of seed 0
    assert tuple(range(50)) not in epochs.values()
    places = collections.Counter(order.index(0) // 10 for order in epochs.values())
    assert len(places) > 2
    plain = batching.ResumableData(range(50), batch_size=50, seed=0, shuffle=False)
    assert plain.batch(0) == plain.batch(3) == list(range(50))
    assert plain.epoch(3) == 3.0


@pytest.mark.parametrize(
    "change", [{"batch_size": 0}, {"batch_size": 2.0}, {"seed": -1}, {"seed": None}, {"records": []}]
)
def test_bad_settings(change):
    settings = {"records": [1], "batch_size": 1, "seed": 0, **change}
    with pytest.raises(InputError):
        batching.ResumableData(settings.pop("records"), **settings)


def prompts(*texts, source="a.jsonl"):
    return [Prompt(text, Row(source, line, {"prompt": text})) for line, text in enumerate(texts, 1)]


def test_fingerprint_names_what_differs():
    settings = {"batch_size": 2, "seed": 1, "identity": {"prompt_length": 8, "tokenizer": "abc"}}
    make = lambda records, **more: batching.ResumableData(records, **{**settings, **more}).fingerprint()
    saved = json.loads(json.dumps(make(prompts("a", "b", "c"))))
    batching.check_fingerprint(saved, make(prompts("a", "b", "c", source="moved.jsonl")))

    def differing(now):
        with pytest.raises(InputError) as error:
            batching.check_fingerprint(saved, now)
        lines = str(error.value).split("\n")[1:-1]
        return {line.split(":")[0].strip() for line in lines}, str(error.value)

    assert differing(make(prompts("a", "x", "c")))[0] == {"all_records"}
    assert differing(make(prompts("c", "b", "a")))[0] == {"first_record", "last_record", "all_records"}
    assert {"num_records", "order"} <= differing(make(prompts("a", "b", "c", "d")))[0]
    names, message = differing(make(prompts("a", "b", "c"), batch_size=3, identity={"prompt_length": 9}))
    assert names == {"batch_size", "prompt_length", "tokenizer"}
    assert "  batch_size: saved 2, now 3\n" in message and "tokenizer: saved 'abc', now '(none)'" in message
    assert "seed" in differing(make(prompts("a", "b", "c"), seed=2))[0]
    assert "shuffle" in differing(make(prompts("a", "b", "c"), shuffle=False))[0]


def test_fingerprint_reads_every_kind_of_record():
    @dataclasses.dataclass
    class Tokens:
        ids: np.ndarray
        row: int

    make = lambda value: batching.ResumableData([value], batch_size=1, seed=0).fingerprint()["first_record"]
    assert make(Tokens(np.arange(3), 1)) == make(Tokens(np.arange(3), 2)) != make(Tokens(np.arange(4), 1))
    assert make({"a": [1, ("b", None)]}) == make({"a": [1, ["b", None]]}) != make({"a": [1, ["b"]]})


def test_epochs_to_steps():
    assert (
        batching.steps_for_epochs(3000, 30, 64) == 1407
    )  # the last steps of a real run, which ceil(47) * 30
    assert batching.steps_for_epochs(2000, 10, 64) == 313  # = 1410 and 320 would miss
    assert batching.steps_for_epochs(10, 0.5, 5) == 1
