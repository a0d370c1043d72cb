"""Accelerator types of Cloud TPU: what a name says about chips, hosts, topology and runtime version.

Names count TensorCores where a chip has two (v4-32 and v5p-32 are 16 chips), and chips where it has one
(v5litepod-16 and v6e-16 are 16 chips). JAX sees one device a chip in all of them."""

import dataclasses
import math
import re

from rlhf_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Generation:
    plan: str  # its name in --topology of experiments.plan
    cores: int  # TensorCores a chip, which the number in the name counts
    axes: int  # of the topology
    max_chips: int  # of one slice
    runtime_version: str
    gke_accelerator: str  # label cloud.google.com/gke-tpu-accelerator
    gke_machine: str  # of a node in a slice of several


# https://cloud.google.com/tpu/docs/runtimes and the page of each version
GENERATIONS = {
    "v4": Generation("v4", 2, 3, 4096, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu-4t"),
    "v5litepod": Generation(
        "v5e", 1, 2, 256, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"
    ),
    "v5p": Generation("v5p", 2, 3, 6144, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-4t"),
    "v6e": Generation("v6e", 1, 2, 256, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-4t"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    name: str  # as gcloud's --accelerator-type has it
    runtime_version: str
    chips: int | None = None  # None: a name that is not known here
    hosts: int | None = None  # virtual machines, one process each
    topology: str | None = None  # of the usual shape: 4x4, 2x2x4


def find(name: str, runtime_version: str = "") -> Slice:
    """The slice of a name. A name that is not known needs a runtime version, and then goes to gcloud as it is.

    Raises: InputError naming what is known, and what a wrong number could have meant.
    """
    family, _, number = name.rpartition("-")
    generation = GENERATIONS.get(family)
    if generation is None or not re.fullmatch(r"[1-9]\d*", number):
        if runtime_version:
            return Slice(name, runtime_version)
        known = ", ".join(f"{family}-N" for family in GENERATIONS)
        raise InputError(
            f"--type={name} is not one of {known}; for another give --runtime_version too (gcloud compute tpus "
            "tpu-vm versions list --zone=ZONE names those there are)."
        )
    chips, rest = divmod(int(number), generation.cores)
    least = 4 if generation.axes == 3 else 1
    power = chips > 0 and not chips & (chips - 1) and chips != 2
    # 3D slices of more than a cube of 64 also come in other multiples of it.
    fits = power or (generation.axes == 3 and chips % 64 == 0)
    if rest or not fits or not least <= chips <= generation.max_chips:
        unit = "TensorCores, two a chip" if generation.cores == 2 else "chips"
        sizes = [
            generation.cores * 2**k for k in range(13) if least <= 2**k <= generation.max_chips and k != 1
        ]
        raise InputError(
            f"--type={name}: {family} has no slice of {number}; the number counts {unit}: "
            f"{', '.join(f'{family}-{size}' for size in sizes[:6])}, ... {family}-{sizes[-1]}."
        )
    one_host = generation.axes == 2 and chips <= 8
    return Slice(
        name,
        runtime_version or generation.runtime_version,
        chips,
        1 if one_host else chips // 4,
        topology(chips, generation.axes) if power else None,
    )


def topology(chips: int, axes: int) -> str:
    """The usual shape of a power of two chips: as near to a square (cube) as it goes, the longest side last."""
    if axes == 3 and chips == 4:
        return "2x2x1"  # one host
    k = int(math.log2(chips))
    return "x".join(str(2 ** ((k + i) // axes)) for i in range(axes))


def hosts(shape: str, chips_a_host: int = 4) -> int:
    """Hosts of a topology such as 4x8 or 2x2x4, in a slice of several hosts."""
    return math.prod(map(int, shape.split("x"))) // chips_a_host
