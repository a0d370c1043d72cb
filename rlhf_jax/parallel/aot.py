"""Compile a jitted function for a described slice and measure it: memory, FLOPs, HBM traffic, collectives, bound.

Nothing is allocated and no TPU is needed, only its compiler (libtpu). Knows functions and abstract arguments, no
config."""

import dataclasses
import pathlib
import re
import tempfile
import time

import jax
import numpy as np

from rlhf_jax.parallel import collectives, flops, hlo, roofline
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.parallel.chips import GIB, Slice


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip."""

    arguments: int
    temporaries: int
    outputs: int  # beyond those that take the place of arguments
    peak: int  # of the program with its arguments
    kept: frozenset[int] = frozenset()  # identities of the abstract arguments among `arguments`


@dataclasses.dataclass(frozen=True)
class Part:
    """What a program does, of one chip and one execution."""

    flops: float
    hbm_bytes: float
    collectives: dict[str, collectives.Total]
    bound: roofline.Bound


@dataclasses.dataclass(frozen=True)
class Measured:
    compile_seconds: float  # on the wall, tracing included
    compile_cpu_seconds: float  # of all threads: what it takes where nothing else runs
    memory: Memory | None  # None: it does not fit
    once: Part | None = None  # outside of loops that the data end
    looped: Part | None = None  # inside of those, if they turn as often as they may
    over: str = ""  # the compiler's words where it does not fit
    needs_bytes: float = 0.0  # where it says

    @property
    def fits(self) -> bool:
        return self.memory is not None


def measure(function, arguments: tuple, mesh, where: Slice, trips: int = 1) -> Measured:
    """
    Args:
      function: jitted. arguments: arrays as ShapeDtypeStruct with shardings on `mesh`, and its static arguments.
      trips: turns of its loops that the data end, at most.
    """
    start, busy = time.perf_counter(), time.process_time()
    took = lambda: (time.perf_counter() - start, time.process_time() - busy)
    with meshes.activate(mesh):
        traced = function.trace(*arguments)
        try:
            memory, text = compile_traced(traced, arguments)
        except jax.errors.JaxRuntimeError as error:
            needs, said = out_of_memory(str(error))
            if said is None:
                raise
            return Measured(*took(), None, over=said, needs_bytes=needs)
    seconds = took()
    counted = flops.count(traced.jaxpr, trips)
    program = hlo.Program(text)
    traffic = [0, 0]
    for run in program.runs(trips):
        traffic[run.by_data] += run.times * program.traffic(run)
    # The partitioner numbers devices by their place in the mesh.
    places = np.array([coordinates(device) for device in mesh.devices.flat])
    sent = collectives.count(program, mesh.size, lambda group: where.reach(places[np.asarray(group)]), trips)
    parts = []
    for amount, bytes_, totals in zip((counted.once, counted.looped), traffic, sent, strict=True):
        one = roofline.bound(
            amount / mesh.size,
            bytes_,
            sum(total.seconds for total in totals.values()),
            peak_flops=where.chip.peak_flops,
            hbm_bandwidth=where.chip.hbm_bandwidth,
        )
        parts.append(Part(amount / mesh.size, bytes_, totals, one))
    return Measured(*seconds, memory, *parts)


def compile_traced(traced, arguments) -> tuple[Memory, str]:
    """(memory, compiled text).  Raises: JaxRuntimeError of the compiler, if it does not fit for one."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = traced.lower().compile(compiler_options=options)
        try:
            text = compiled.as_text()
        except jax.errors.JaxRuntimeError:
            # jaxlib does not read every program that a newer libtpu writes (asynchronous updates of several operands:
            # 0.10.2 and 0.0.51); the compiler's own words are the same text.
            (written,) = pathlib.Path(folder).glob("*.after_codegen.txt")
            text = written.read_text()
        return _memory(compiled, arguments), text


def coordinates(device) -> tuple[int, ...]:
    return tuple(getattr(device, "coords", (0, 0, 0)))


def bytes_of(tree) -> int:
    """Of one chip: what its shards of the arrays take, without padding."""
    return sum(map(_shard_bytes, jax.tree.leaves(tree)))


def _shard_bytes(x) -> int:
    shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
    size = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else np.dtype(x.dtype).itemsize
    return int(np.prod(shape, dtype=np.int64)) * size


def _memory(compiled, arguments) -> Memory:
    found = compiled.memory_analysis()
    beyond = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        beyond,
        # Not peak_memory_in_bytes, which also has what lies in the fast memory beside the cores.
        found.argument_size_in_bytes + found.temp_size_in_bytes + beyond,
        kept_arguments(compiled, arguments),
    )


def kept_arguments(compiled, arguments) -> frozenset[int]:
    """Identities of the abstract arrays that the program is handed: those it does not read are left out."""
    arrays = tuple(
        one for one in arguments if all(map(_is_abstract, jax.tree.leaves(one)))
    )  # the others are static
    read = jax.tree.map(
        lambda x, sharding: None if sharding is None else x, arrays, compiled.input_shardings[0]
    )
    return frozenset(map(id, jax.tree.leaves(read)))


def _is_abstract(x) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


_OOM = re.compile(r"\(([\d.]+)([KMGTP]?)\) exceeds available (?:HBM|memory) \(([\d.]+)([KMGTP]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGTP]?) of ([\d.]+)([KMGTP]?) hbm")
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def out_of_memory(text: str) -> tuple[float, str | None]:
    """(bytes that a program needs, "needs X of Y GiB") from the compiler's message; (0, None) of any other error."""
    found = _OOM.search(text) or _USED.search(text)
    if found is None:
        if "RESOURCE_EXHAUSTED" in text or "CompileTimeHbmOom" in text:
            return 0.0, "needs more memory than there is"
        return 0.0, None
    need, unit, has, of = found.groups()
    needs, available = float(need) * 1024.0 ** _UNITS[unit], float(has) * 1024.0 ** _UNITS[of]
    return needs, f"needs {needs / GIB:.2f} of {available / GIB:.2f} GiB"
