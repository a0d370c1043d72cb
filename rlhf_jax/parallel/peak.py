"""How fast a device multiplies matrices: what utilisation is measured against.

Of a TPU what its maker says (chips.py); of any other device what it does here, measured. Knows no model."""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.parallel.chips import CHIPS

# What jax calls the chips of the table.
TPU_KINDS = {"TPU v2": "v2", "TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p",
             "TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e"}  # fmt: skip
SIZES = {"cpu": (512, 1024)}  # of the products that are measured
LARGE_SIZES = (2048, 4096, 8192)  # where a device has memory and speed of its own
SECONDS_A_SIZE = 0.04
TOO_SLOW_SECONDS = 0.05  # a product that takes so long is the last


@dataclasses.dataclass(frozen=True)
class Peak:
    flops: float  # products of matrices a second, of all devices together
    source: str  # where that is from, for the reader


def of_devices(devices: Sequence, dtype) -> Peak:
    """Of the devices of a run, all of one kind, in the dtype of its computation.

    The devices of a CPU share its cores, and one alone uses them all: it counts once a process.
    """
    devices, dtype = list(devices), jnp.dtype(dtype).name
    first = devices[0]
    chip = TPU_KINDS.get(first.device_kind)
    if chip is not None:
        return Peak(
            CHIPS[chip].peak_flops * len(devices), f"{len(devices)} x {chip}, bfloat16, of its data sheet"
        )
    count = len({one.process_index for one in devices}) if first.platform == "cpu" else len(devices)
    rate = _measured_once(first.platform, dtype)
    return Peak(rate * count, f"{count} x {first.device_kind}, {dtype}, measured")


@functools.cache
def _measured_once(platform: str, dtype: str) -> float:
    return measured(dtype, SIZES.get(platform, LARGE_SIZES), SECONDS_A_SIZE)


def measured(dtype, sizes: Sequence[int], seconds: float) -> float:
    """The best of several square products on a device of this process, in floating-point operations a second.

    seconds: to repeat each size for, at the least once."""
    best, multiply, device = 0.0, jax.jit(jnp.matmul), jax.local_devices()[0]
    for n in sizes:
        x = jax.device_put(np.ones((n, n), jnp.dtype(dtype)), device)
        multiply(x, x).block_until_ready()  # compiles
        stop, took = time.perf_counter() + seconds, 0.0
        while not took or time.perf_counter() < stop:
            began = time.perf_counter()
            multiply(x, x).block_until_ready()
            took = time.perf_counter() - began
            best = max(best, 2 * n**3 / took)
        if took > max(seconds, TOO_SLOW_SECONDS):
            break
    return best
