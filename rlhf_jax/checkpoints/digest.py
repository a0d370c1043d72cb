"""A fingerprint of every array of a tree, made on the device: what a restored checkpoint is compared with.

Opens no file and knows nothing of orbax or steps."""

import jax
import jax.numpy as jnp
import numpy as np


def digest(tree) -> dict[str, int]:
    """{leaf path: 64 bits of its values and their order}, the same on every mesh and number of devices."""
    leaves = named_leaves(tree)
    groups = {}  # one jit call takes arrays of one set of devices
    for name, x in leaves.items():
        devices = frozenset(x.sharding.device_set) if isinstance(x, jax.Array) else None
        groups.setdefault(devices, {})[name] = x
    digests = {}
    for group in groups.values():
        halves = jax.device_get(_digests(list(group.values())))
        digests |= {name: int(high) << 32 | int(low) for name, (high, low) in zip(group, halves, strict=True)}
    return digests


@jax.jit
def _digests(leaves: list):
    return [_leaf_digest(x) for x in leaves]


def _leaf_digest(x):
    """Two sums modulo 2^32. Sums of integers do not depend on their order, hence not on the mesh. The first has odd
    factors: it changes with any one flipped bit. The second is of values scrambled with their position."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}"))
    elif x.dtype.itemsize == 8:
        x = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits, position, stride = x.astype(jnp.uint32), jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    scrambled = bits ^ (position * jnp.uint32(0x9E3779B9))
    for factor, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):  # the finalizer of MurmurHash3
        scrambled = (scrambled ^ (scrambled >> 16)) * jnp.uint32(factor)
        scrambled ^= scrambled >> shift
    total = lambda values: jnp.sum(values, dtype=jnp.uint32)
    return total(bits * (2 * position + 1)), total(scrambled)


def named_leaves(tree) -> dict:
    """{path: leaf}; flat, so that None, empty containers and named tuples need no care on disk."""
    named = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"two leaves have the path {name}")
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise TypeError(f"{name} is {x!r}; only arrays can be kept in a checkpoint")
        plain = jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and (
            not plain
            or jnp.issubdtype(x.dtype, jnp.complexfloating)
            or jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype
        ):
            raise TypeError(f"{name} has dtype {x.dtype}, which cannot be kept in a checkpoint as it is")
        named[name] = np.asarray(x) if isinstance(x, np.generic) else x
    return named
