"""The device mesh: its axes, its start-up, and the context in which everything sharded is traced.

Knows the names `data`, `fsdp` and `tensor`; what they hold is sharding.py's business."""

import contextlib
import math

import flax.linen as nn
import jax
import numpy as np

from rlhf_jax.errors import InputError
from rlhf_jax.parallel.sharding import RULES

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> jax.sharding.Mesh:
    """A mesh over all devices (or those given). One axis may be -1: it takes what the others leave.

    Raises: InputError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    named = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise InputError(
            f"config.mesh is {named}; sizes must be 1 or more, and at most one of them -1 (what the others leave)."
        )
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        fit = "does not divide" if -1 in (data, fsdp, tensor) else "is not"
        raise InputError(
            f"config.mesh is {named}: {fixed} {fit} the number of devices, {len(devices)}; change "
            "config.mesh.data, .fsdp and .tensor so that their product is the number of devices (-1: the rest)."
        )
    # Auto axes: linen's logical constraints are requests to the partitioner (explicit axes make them assertions).
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.Mesh(np.array(devices).reshape(sizes), AXES, axis_types=kinds)


@contextlib.contextmanager
def activate(mesh: jax.sharding.Mesh):
    """Trace inside this, or logical constraints do nothing. `with mesh:` alone silently switches them off."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh
