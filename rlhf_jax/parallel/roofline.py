"""The shortest time that a program can take on a chip: arithmetic, memory and links, whichever is slowest.

Williams et al. 2009, "Roofline". Assumes that the three overlap wholly and that each runs at its full speed; a run
reaches a part of that. Knows numbers, no programs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds, of one chip."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def binds(self) -> str:
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


def bound(
    flops: float, hbm_bytes: float, link_seconds: float, *, peak_flops: float, hbm_bandwidth: float
) -> Bound:
    """flops, hbm_bytes: of one chip. link_seconds: what its collectives take."""
    return Bound(flops / peak_flops, hbm_bytes / hbm_bandwidth, link_seconds)
