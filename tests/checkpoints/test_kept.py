"""What may be computed again is never read where it is not what was written."""

import numpy as np
import pytest

from rlhf_jax.checkpoints import kept

ARRAYS = {
    "train": np.arange(12, dtype=np.float32).reshape(3, 2, 2),
    "held_out": np.zeros((1, 2, 2), np.float32),
}
MADE_OF = {"base": {"w": 7}, "lengths": [4, 2]}


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "reference" / "dpo.npz")
    kept.save(path, MADE_OF, ARRAYS)
    return path


def test_comes_back(path):
    found = kept.load(path, MADE_OF)
    assert found.keys() == ARRAYS.keys()
    for name, x in ARRAYS.items():
        np.testing.assert_array_equal(found[name], x)
        assert found[name].dtype == np.float32


def test_of_something_else_or_absent(path, tmp_path):
    assert kept.load(path, MADE_OF | {"base": {"w": 8}}) is None
    assert kept.load(str(tmp_path / "none.npz"), MADE_OF) is None
    np.savez(path, **ARRAYS)
    assert kept.load(path, MADE_OF) is None


@pytest.mark.parametrize("at", [0, 0.1, 0.3, 0.6, 0.97])
def test_damaged(path, at):
    content = bytearray(open(path, "rb").read())
    cut = content[: int(at * len(content))]
    open(path, "wb").write(cut)
    assert kept.load(path, MADE_OF) is None


def test_every_changed_byte_is_harmless_or_seen(path):
    content = open(path, "rb").read()
    for i in range(0, len(content), 7):
        open(path, "wb").write(content[:i] + bytes([content[i] ^ 0x10]) + content[i + 1 :])
        found = kept.load(path, MADE_OF)
        assert found is None or all(np.array_equal(found[name], x) for name, x in ARRAYS.items())
