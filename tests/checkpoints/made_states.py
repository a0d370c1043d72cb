"""States with a leaf of every kind that a checkpoint must keep, and what tests of the store do with them."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.checkpoints.store import CheckpointStore


@flax.struct.dataclass
class State:
    weights: dict
    opt_state: object
    rng: jax.Array
    head: object = None


@jax.jit
def make(step):
    w = jax.random.normal(jax.random.key(step), (8, 16))
    weights = {
        "w": w.at[0, 0].set(jnp.nan),
        # Larger than orbax keeps in its checksummed index: only our digest guards these.
        "large": jax.random.normal(jax.random.key(step + 100), (32, 64)),
        "half": w.astype(jnp.bfloat16),
        "flags": w > 0,
        "small": (w * 50).astype(jnp.int8),
        "step": jnp.int32(step),
        "empty": jnp.zeros((0, 3)),
        "none": {},
    }
    return State(weights, optax.adam(0.1).init(w), jax.random.split(jax.random.key(step), 2))


def abstract(state, sharding=None):
    where = (lambda x: x.sharding) if sharding is None else lambda x: sharding
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)), state)


def bits(state):
    """Host bytes of every leaf: an independent notion of equality, NaN included."""
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    leaves, structure = jax.tree.flatten(state)
    return structure, [(str(x.dtype), x.shape, np.asarray(raw(x)).tobytes()) for x in leaves]


def open_store(directory, log=None, **options):
    return CheckpointStore(str(directory), log=(log if log is not None else []).append, **options)
