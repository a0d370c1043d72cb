"""A plan: every phase compiled for a slice, what it needs and takes, and whether all of it fits.

Puts aot.py's measurements of phases.py's programs together; plan_fixes.py and plan_search.py ask it about other
configs. Gives plain dicts, as they are printed and written."""

import dataclasses

import jax

from rlhf_jax.parallel import aot
from rlhf_jax.parallel.chips import Slice
from rlhf_jax.training.phases import Phase, Stage
from rlhf_jax.training.planned import PlannedRun

ASSUMPTIONS = (
    "Memory: what the compiler reserves for arguments, temporaries and results of a program, and beside it what else "
    "the stage keeps on the chip: base, adapters, optimizer state, reward model, the batch of the step before. "
    "Fragmentation, the profiler and a second copy of a donated array during a checkpoint are not in it.",
    "Lengths: every prompt has data.prompt_tokens and every completion data.completion_tokens; a run pads to its "
    "longest prompt and stops sampling when all completions have ended. They are decoded all at once, whatever "
    "sampling.slots and sampling.halvings are.",
    "FLOPs: products of matrices alone, of all chips together by the number of chips, recomputation of remat counted.",
    "HBM traffic: operands read and results written by each instruction of the compiled program, once a turn of its "
    "loop; what lies in the chip's fast memory is free.",
    "Collectives: bytes that reach a chip, at the full speed of the links that its group is spread over; nothing for "
    "latency, or for hosts of several slices.",
    "Bound: the slowest of arithmetic (at the chip's bfloat16 peak), HBM and links, if the three overlap wholly.",
    "Time: what is compiled, read from disk, decoded to text, scored by functions of text or saved is not in it.",
    "Programs get batches split over their rows, as the run places its own.",
)


@dataclasses.dataclass(frozen=True)
class Found:
    """A phase, measured."""

    stage: Stage
    phase: Phase
    measured: aot.Measured
    beside: int  # bytes a chip of what the stage keeps and the program is not handed

    @property
    def bytes(self) -> float:
        """Of a chip, while it runs; of one that does not fit, what the compiler says."""
        own = self.measured.memory.peak if self.measured.fits else self.measured.needs_bytes
        return own + self.beside

    def fits(self, where: Slice) -> bool:
        return self.measured.fits and self.bytes <= where.chip.hbm_bytes

    @property
    def seconds(self) -> float:
        """Of one call, at the bound."""
        if not self.measured.fits:
            return float("nan")
        return self.measured.once.bound.seconds + self.measured.looped.bound.seconds


def measure(run: PlannedRun, stage: Stage, phase: Phase, where: Slice) -> Found:
    found = aot.measure(phase.function, phase.arguments, run.mesh, where, phase.trips)
    if found.fits:
        handed = found.memory.kept
    else:
        handed = frozenset(map(id, jax.tree.leaves(phase.arguments)))
    kept = {id(x): x for x in jax.tree.leaves(stage.resident)}
    beside = aot.bytes_of([x for name, x in kept.items() if name not in handed])
    return Found(stage, phase, found, beside)


def of_stages(run: PlannedRun, stages: list[Stage], where: Slice, tell=lambda text: None) -> list[Found]:
    """Every phase, compiled. tell: called before each."""
    total, done = sum(len(stage.phases) for stage in stages), []
    for stage in stages:
        for phase in stage.phases:
            tell(f"compiling {stage.name}: {phase.name} ({len(done) + 1} of {total})")
            done.append(measure(run, stage, phase, where))
    return done


def report(run: PlannedRun, stages: list[Stage], found: list[Found], where: Slice, efficiency: float) -> dict:
    """The plan as it is printed and as JSON. Bytes, FLOPs and seconds are of one chip.

    efficiency: part of the bound's speed that a run is taken to reach; the expected times are the bound's over it.
    """
    told = [
        _stage(stage, [one for one in found if one.stage is stage], where, efficiency) for stage in stages
    ]
    fits = all(one.fits(where) for one in found)
    largest = max(found, key=lambda one: one.bytes, default=None)
    hours = [stage["expected_hours"] for stage in told]
    return {
        "topology": where.name,
        "chip": where.chip.name,
        "chips": where.chips,
        "devices": where.devices,
        "hbm_bytes": where.chip.hbm_bytes,
        "mesh": dict(run.mesh.shape),
        "model": run.config.model.path,
        "fits": fits,
        "largest": None
        if largest is None
        else {"stage": largest.stage.name, "phase": largest.phase.name, "bytes": largest.bytes},
        "headroom_bytes": where.chip.hbm_bytes - (largest.bytes if largest else 0),
        "stages": told,
        "expected_hours": None if None in hours else sum(hours),
        "expected_chip_hours": None if None in hours else sum(hours) * where.chips,
        "compile_seconds": sum(one.measured.compile_seconds for one in found),
        "compile_cpu_seconds": sum(one.measured.compile_cpu_seconds for one in found),
        "efficiency": efficiency,
        "assumptions": [
            *ASSUMPTIONS,
            f"Expected times: {efficiency:.0%} of the bound's speed (--efficiency).",
        ],
    }


def _stage(stage: Stage, found: list[Found], where: Slice, efficiency: float) -> dict:
    fits = all(one.fits(where) for one in found)
    seconds = sum(one.phase.calls * one.seconds for one in found) if fits else None
    steps = max(stage.steps, 1)
    # A phase that is not run at every step, the statistics of the reference say, is no part of one.
    step = sum(_whole_calls(one.phase, steps) * one.seconds for one in found) if fits else None
    made = max(
        (one.phase.tokens * _whole_calls(one.phase, steps) for one in found if one.phase.samples), default=0
    )
    made = made or max((one.phase.tokens * _whole_calls(one.phase, steps) for one in found), default=0)
    return {
        "name": stage.name,
        "steps": stage.steps,
        "resident_bytes": aot.bytes_of(list({id(x): x for x in jax.tree.leaves(stage.resident)}.values())),
        "unplanned": list(stage.unplanned),
        "fits": fits,
        "phases": [_phase(one, where, efficiency) for one in found],
        "step_bound_seconds": step,
        "step_expected_seconds": None if step is None else step / efficiency,
        "tokens_per_step": made,
        "expected_tokens_per_second": made * efficiency / step if step else None,
        "expected_hours": None if seconds is None else seconds / efficiency / 3600,
        "expected_chip_hours": None if seconds is None else seconds / efficiency / 3600 * where.chips,
    }


def _whole_calls(phase: Phase, steps: int) -> int:
    return int(phase.calls // steps)


def _phase(one: Found, where: Slice, efficiency: float) -> dict:
    phase, measured = one.phase, one.measured
    told = {
        "name": phase.name,
        "calls": phase.calls,
        "fits": one.fits(where),
        "bytes": one.bytes,
        "beside_bytes": one.beside,
        "compile_seconds": measured.compile_seconds,
        "compile_cpu_seconds": measured.compile_cpu_seconds,
        "tokens": phase.tokens,
    }
    if not measured.fits:
        return told | {"compiler": measured.over}
    memory = dataclasses.asdict(measured.memory)
    del memory["kept"]
    told |= {f"{name}_bytes": value for name, value in memory.items()}
    told |= _part(measured.once, measured.looped) | {"bound_seconds": one.seconds}
    if phase.samples:
        told["parts"] = {"prefill": _part(measured.once), "decode": _part(measured.looped)}
    if phase.tokens and one.seconds:
        told["expected_tokens_per_second"] = phase.tokens * efficiency / one.seconds
    return told


def _part(*parts: aot.Part) -> dict:
    sent: dict[str, dict] = {}
    for part in parts:
        for kind, total in part.collectives.items():
            into = sent.setdefault(kind, {"count": 0, "bytes": 0.0, "seconds": 0.0})
            for name in into:
                into[name] += getattr(total, name)
    names = ("compute", "memory", "interconnect")
    bound = {f"{name}_seconds": sum(getattr(part.bound, name) for part in parts) for name in names}
    largest = max(parts, key=lambda part: part.bound.seconds)
    return {
        "flops": sum(part.flops for part in parts),
        "hbm_bytes": sum(part.hbm_bytes for part in parts),
        "collectives": sent,
        **bound,
        "bound_seconds": sum(part.bound.seconds for part in parts),
        "binds": largest.bound.binds,
    }
