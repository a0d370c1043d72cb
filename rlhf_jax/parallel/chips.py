"""TPU chips and slices: what a plan divides by, and how the chips of a slice are joined.

HBM is what the compiler lets a program use (its own out-of-memory message says so), a little less than is sold. Peak
FLOP/s and HBM bandwidth: Google Cloud's pages of each version (cloud.google.com/tpu/docs/v5e and the like). Links
between chips: "How to Scale Your Model" (jax-ml.github.io/scaling-book, chapter 2) for v5e, v5p, v6e; for v4 and older
the papers, Jouppi et al. 2023 (arXiv:2304.01433) and Jouppi et al. 2020 (CACM 63:7). Knows no model or config."""

import dataclasses
import math
import re

import numpy as np

from rlhf_jax.errors import InputError

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one jax device, which on v2 and v3 is half a chip."""

    name: str
    hbm_bytes: int  # that a program may use
    peak_flops: float  # bfloat16 products a second
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: (
        float  # bytes a second, one way, of one link; a device has two in each dimension of the torus
    )
    dimensions: int  # of the torus
    wraps_at: int  # a dimension of this size, or of a multiple, closes to a ring
    examples: tuple[str, ...]
    devices_a_chip: int = 1
    options: tuple[tuple[str, str], ...] = ()  # that name it to the compiler


CHIPS = {
    chip.name: chip
    for chip in (
        # The links of v2 and v3 are a chip's, and are shared by its two devices.
        Chip("v2", int(7.48 * GIB), 22.5e12, 350e9, 31e9, 2, 16, ("2x2", "4x4", "16x16"), 2),
        Chip("v3", int(15.48 * GIB), 61.5e12, 450e9, 41e9, 2, 32, ("2x2", "4x4", "16x16"), 2),
        Chip("v4", int(30.75 * GIB), 275e12, 1228e9, 45e9, 3, 4, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
             options=(("chip_config_name", "megacore"),)),
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 45e9, 2, 16, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16",
                                                                    "16x16")),
        Chip("v5p", int(95.73 * GIB), 459e12, 2765e9, 90e9, 3, 4, ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4",
                                                                   "4x4x8")),
        Chip("v6e", int(31.24 * GIB), 918e12, 1640e9, 90e9, 2, 16, ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16",
                                                                    "16x16")),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one kind, joined: a topology such as v5e:4x4."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices_a_chip

    def reach(self, coordinates) -> float:
        """Bytes a second that one device can receive at best, of those that it exchanges with a group of devices.

        coordinates: [N, 3] of the group. A dimension along which the group is spread gives two links where it is a
        ring, and one at the ends of a line: the last device to have everything stands there. Along several dimensions
        data arrive on all of them at once.
        """
        spread = np.ptp(np.asarray(coordinates), axis=0) + 1
        links = 0
        for size, whole in zip(spread, (*self.shape, 1, 1), strict=False):
            ring = size == whole and whole % self.chip.wraps_at == 0
            links += 0 if size == 1 else 2 if ring else 1
        return max(links, 1) * self.chip.link_bandwidth


def parse(topology: str) -> Slice:
    """The slice of a name such as v5e:4x4, v4:2x2x4.  Raises: InputError naming those there are."""
    named = ", ".join(f"{chip.name}:{chip.examples[-3]}" for chip in CHIPS.values())
    kind, _, shape = topology.partition(":")
    kind = {"v5": "v5p", "v5litepod": "v5e"}.get(kind, kind)
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise InputError(
            f"the topology is {topology!r}; expected a chip and the shape of a slice, such as {named} (chips: "
            f"{', '.join(CHIPS)})."
        )
    chip, sizes = CHIPS[kind], tuple(map(int, shape.split("x")))
    if len(sizes) != chip.dimensions or 0 in sizes:
        raise InputError(
            f"the topology is {topology!r}; a slice of {kind} has {chip.dimensions} dimensions, such as "
            f"{', '.join(f'{kind}:{example}' for example in chip.examples)}."
        )
    return Slice(f"{kind}:{shape}", chip, sizes)


def describe(topology: Slice) -> list:
    """Its devices as jax sees them, without one of them. Needs libtpu.

    Raises: InputError if the compiler knows no such slice; ModuleNotFoundError without libtpu.
    """
    import libtpu  # noqa: F401  the compiler; jax's own message without it names no package of ours
    from jax.experimental.topologies import get_topology_desc

    try:
        options = dict(topology.chip.options)
        return list(get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices)
    except Exception as error:  # of the compiler's runtime, whose classes are private
        if "INVALID_ARGUMENT" not in str(error) and "NOT_FOUND" not in str(error):
            raise
        known = ", ".join(f"{topology.chip.name}:{example}" for example in topology.chip.examples)
        reason = str(error).split("INVALID_ARGUMENT: ")[-1].splitlines()[0]
        raise InputError(
            f"the compiler knows no slice {topology.name} ({reason}); for example {known}."
        ) from None
