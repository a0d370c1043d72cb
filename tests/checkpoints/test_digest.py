"""The digest of a tree: written anew with Python's integers, and changed by any one bit."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.checkpoints.digest import digest


def reference_digest(values):
    """Written anew with Python's integers, over little-endian words."""
    word = min(values.dtype.itemsize, 4)
    words = np.frombuffer(values.tobytes(), f"<u{word}").tolist()
    if np.issubdtype(values.dtype, np.signedinteger):
        words = [int(x) % 2**32 for x in values.ravel()]
    first = second = 0
    for i, bits_ in enumerate(words):
        first += bits_ * (2 * i + 1)
        x = bits_ ^ (i * 0x9E3779B9 % 2**32)
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x ^= x >> 13
        x = (x ^ (x >> 16)) * 0xC2B2AE35 % 2**32
        second += x ^ (x >> 16)
    return (first % 2**32) << 32 | second % 2**32


def test_digest_against_integers_and_every_bit():
    rng = np.random.default_rng(0)
    values = {
        "f32": rng.normal(size=(3, 5, 2)).astype(np.float32),
        "bf16": rng.normal(size=(4, 4)).astype(jnp.bfloat16),
        "i8": rng.integers(-100, 100, size=7).astype(np.int8),
        "i32": rng.integers(-(2**31), 2**31, size=(2, 3)).astype(np.int32),
        "bool": rng.normal(size=9) > 0,
        "scalar": np.float32(0.1) * np.ones((), np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    expected = {name: reference_digest(x) for name, x in values.items()}
    assert digest(values) == expected
    assert digest(jax.tree.map(jnp.asarray, values)) == expected
    key = jax.random.key(5)
    assert digest({"k": key}) == {"k": reference_digest(np.asarray(jax.random.key_data(key)))}

    x = values["f32"]
    for bit in rng.integers(0, x.size * 32, size=40):
        flipped = x.copy()
        flipped.view(np.uint32).reshape(-1)[bit // 32] ^= np.uint32(1 << (bit % 32))
        assert digest({"f32": flipped})["f32"] >> 32 != expected["f32"] >> 32
    assert digest({"f32": x.swapaxes(0, 1).copy().reshape(x.shape)})["f32"] != expected["f32"]
    assert digest({"z": jnp.float32(0.0)}) != digest({"z": jnp.float32(-0.0)})
