"""Where arrays lie while the decoder runs, asked for by logical axis names: requests to the partitioner of the active
mesh, and nothing at all without one.

Knows no mesh axis: the rules that are active (parallel/sharding.py) say what a name means."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

# What a weight's axis is called when it is used, and an activation's along it.
_USED = {"embed": "width_of_weights"}
_ACTIVE = {"embed": "width"}


def constrain(x, *names):
    """x [...], its axes laid as the rules have it for these names; None: whole. So are key/value heads that are fewer
    than the devices along their axis, as in parallel/sharding.py's `spec`."""
    few = [name == "kv_heads" and size % ways(name) for name, size in zip(names, x.shape, strict=True)]
    return nn.with_logical_constraint(
        x, tuple(None if whole else n for n, whole in zip(names, few, strict=True))
    )


def used(kernel, *names):
    """A weight as a matrix product reads it: gathered over the axis that only its storage is split by, or, where the
    rules of decoding are active, left where it is."""
    return constrain(kernel, *(_USED.get(name, name) for name in names))


def activation(y, *names):
    """y [B, T, ...] of a linear map whose outputs have these names."""
    return constrain(y, "rows", "tokens", *(_ACTIVE.get(name, name) for name in names))


def used_codes(held: dict, names_in, names_out) -> dict:
    """The same of a kernel's codes and scales (models/quantise.py): it is codes that are gathered. Of scales, few, with
    one entry a block of inputs, all blocks are."""
    blocked = held["scales"].ndim > len(names_out)
    inputs = (*names_in[:-1], None) if blocked else ()
    return {
        "codes": used(held["codes"], *names_in, *names_out),
        "scales": used(held["scales"], *inputs, *names_out),
    }


def embedded(table, ids, dtype):
    """[B, T, D] rows of a table [V, D] that is split along both axes.

    Each device looks all ids up that its part of D is needed for, and then the rows go to where they belong. Asked
    for at once, the partitioner would copy the rows of the whole batch to every device. Looked up before the cast, not
    after: then what a token's row gets from all its places is summed in the table's own dtype.
    """
    x = jnp.take(table, constrain(ids, "lookup", "tokens"), axis=0).astype(dtype)
    return constrain(constrain(x, "lookup", "tokens", "embed"), "rows", "tokens", "width")


def ways(name: str) -> int:
    """Into how many parts the active mesh and rules split an axis of this name; 1 without them."""
    axes, sizes = dict(nn.get_logical_axis_rules()).get(name), jax.sharding.get_abstract_mesh().shape
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(sizes.get(axis, 1) for axis in axes)


def kv_heads(num_kv_heads: int) -> int:
    """How many key/value heads are kept in caches: each a few times, if there are more devices along their axis."""
    parts = ways("kv_heads")
    return parts if parts > num_kv_heads and parts % num_kv_heads == 0 else num_kv_heads


def per_device(x_BTKC):
    """Keys or values with each head as often as `kv_heads` says, so that a device holds those that its queries read."""
    K = x_BTKC.shape[2]
    return constrain(jnp.repeat(x_BTKC, kv_heads(K) // K, axis=2), "batch", "tokens", "kv_heads", "head_size")


def columns_at_a_time(V: int, wanted: int) -> int:
    """Vocabulary entries a piece of fused losses; 0: all. All, if no device has more than `wanted` columns of the head
    as its own: a piece across devices would be copied to all of them, and its logits computed by each."""
    return 0 if V <= wanted * ways("vocab") else wanted
