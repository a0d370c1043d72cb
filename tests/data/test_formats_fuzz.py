"""Whatever a field holds, a reader gives records or a message that names the line: never another exception."""

import copy
import random

import pytest

from rlhf_jax.data import formats
from rlhf_jax.errors import InputError
from tests.data.made_rows import rows
from tests.data.test_asked_formats import ALPACA, GSM8K, VERL
from tests.data.test_conversations import HH, SHAREGPT, VERTEX_CHAT, WHOLE
from tests.data.test_formats import VERTEX
from tests.data.test_judged_formats import AXES, COMPARISON, HELPSTEER, KTO, PLAIN, ULTRAFEEDBACK
from tests.data.test_stackexchange import ROW as STACKEXCHANGE

RANKED = {"prompt": "Hi", "completions": ["a", "b"], "ratings": [1, 2]}
GOOD = (VERTEX, VERTEX_CHAT, HH, SHAREGPT, WHOLE, {"prompt": "Hi", **WHOLE}, KTO, PLAIN, HELPSTEER, ULTRAFEEDBACK,
        COMPARISON, AXES, STACKEXCHANGE, RANKED, ALPACA, GSM8K, VERL)  # fmt: skip
JUNK = (None, True, 0, -1, 3.5, float("nan"), float("inf"), 10**19, "", " ", "x", "N/A", [], [None], [[]], {}, {"a": 1},
        [{"role": "user", "content": "x"}], {"role": ["user"], "content": "x"}, "\n\nAssistant:")  # fmt: skip
READERS = (
    formats.pairs,
    formats.labelled,
    formats.rated,
    formats.rankings,
    formats.examples,
    formats.prompts,
)


def places(value):
    """(container, key) of everything inside."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


@pytest.mark.parametrize("good", GOOD, ids=lambda row: ",".join(row)[:40])
def test_junk_anywhere(good):
    rng, outcomes = random.Random(0), set()
    for _ in range(60):
        row = copy.deepcopy(good)
        for container, key in rng.sample(list(places(row)), rng.randint(1, 2)):
            container[key] = copy.deepcopy(rng.choice(JUNK))
        for reader in READERS:
            for untyped in (False, True):
                try:
                    records = reader(rows(row, good, untyped=untyped), max_bad_records=0.5)
                except InputError as error:
                    outcomes.add("refused")
                    assert "p.jsonl" in str(error)
                else:
                    outcomes.add("read")
                    assert all(record.row.line in (1, 2) for record in records)
    assert outcomes == {"read", "refused"}
