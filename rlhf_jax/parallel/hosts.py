"""The processes of one run: how they find each other, and what they tell each other outside of jitted code.

With one process everything here is free, and nothing starts a backend. Several run the same program, step for step:
what one does on the host alone, to a file say, `is_first` decides, and the others wait in `once` or `sync`. What the
end of one means for the others is in peers.py."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable

import jax
import numpy as np

from rlhf_jax.errors import InputError, PeerLost
from rlhf_jax.parallel import peers

HEARTBEAT_SECONDS, SHUTDOWN_SECONDS = 20, 10  # jax's defaults, 100 and 300, are what a dead peer would cost
TOLD = 10  # differences that are spelt out

# Where a launcher says how many processes it has started; by these jax finds the rest itself.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
HOSTS_OF_A_SLICE = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # on GKE


# --- the start


def start(
    address: str | None = None, count: int | None = None, index: int | None = None, detect: bool = False
) -> None:
    """Join the other processes, if there are any. Before the first use of a device.

    Args:
      address: host:port of process 0, count: of processes, index: of this one, from 0; all or none. None: as
        JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say.
      detect: ask jax, which knows SLURM, Open MPI and the metadata server of a TPU VM. Without it only where the
        environment says that there are several, so that nothing that runs alone waits for a server.
    Raises: InputError naming what is missing; PeerLost if the others cannot be reached.
    """
    given = _given(address, count, index)
    if given is None and not (detect or _started_by_a_launcher()):
        return
    if given is not None and given[1] == 1:
        return
    address, count, index = given or (None, None, None)
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            cluster_detection_method="deactivate" if given else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:  # jax found nothing, or numbers that do not fit
        raise InputError(
            f"--distributed: no other process was found ({str(error).strip().splitlines()[0]}) It works on TPU VMs, "
            "under SLURM and under Open MPI; elsewhere give --coordinator_address=HOST:PORT, --num_processes and "
            "--process_id to each process."
        ) from None
    except RuntimeError as error:  # of jaxlib: nobody there
        raise PeerLost(
            f"the other processes could not be reached: {str(error).strip().splitlines()[0]} Start all of them, with "
            "the same address and number."
        ) from None
    if jax.process_count() > 1:
        peers.join(jax.process_index(), jax.process_count(), from_first, (address or "").rpartition(":")[0])


def _given(address, count, index):
    env = os.environ.get
    flags = (address, count, index)
    if all(one is None for one in flags):
        flags = (env("JAX_COORDINATOR_ADDRESS"), env("JAX_NUM_PROCESSES"), env("JAX_PROCESS_ID"))
        if flags[1] is None and flags[2] is None:  # the address alone is for jax's own search
            return None
    names = ("--coordinator_address", "--num_processes", "--process_id")
    missing = [name for name, one in zip(names, flags, strict=True) if one is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} missing: of several processes each gets --coordinator_address=HOST:PORT (of "
            "process 0), --num_processes and --process_id (from 0), or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID in the environment."
        )
    try:
        address, count, index = str(flags[0]), int(flags[1]), int(flags[2])
        fits = 0 <= index < count and address.rpartition(":")[2].isdigit() and ":" in address
    except ValueError:
        fits = False
    if not fits:
        told = ", ".join(f"{name}={one}" for name, one in zip(names, flags, strict=True))
        raise InputError(f"{told}: expected HOST:PORT, and a process from 0 to the number of processes - 1.")
    return address, count, index


def _started_by_a_launcher() -> bool:
    several = any(os.environ.get(name, "").isdigit() and int(os.environ[name]) > 1 for name in LAUNCHERS)
    # A TPU's runtime sets these on a slice of one host too, with one name.
    return several or any("," in os.environ.get(name, "") for name in HOSTS_OF_A_SLICE)


def finish() -> None:
    """All is done: wait for the others, then leave together."""
    if several():
        sync("the end")
        peers.part()
        jax.distributed.shutdown()


def wait_for_news() -> None:
    """At an error that the end of another process may have caused: then that is what is told, and this one ends."""
    peers.wait_for_news()


def leave(status: int, why: str) -> None:
    """End this process, and with it the others, which are told why. Alone it returns."""
    peers.leave(status, why)


def beat(phase: str = "", kind: str = "", least_seconds: float = 300.0) -> None:
    """What this process is about to do, for its watchdog (peers.py): with one process there is none."""
    peers.beat(phase, kind, least_seconds)


_alone = False


@contextlib.contextmanager
def alone():
    """What is inside this process does for itself, as if there were no others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def several() -> bool:
    return not _alone and jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes the logs, the reports, and what else there is once."""
    # Asked in this order: process_index would start the backend.
    return _alone or not jax.distributed.is_initialized() or jax.process_index() == 0


def name() -> str:
    """For messages; empty of one process alone."""
    return f"process {jax.process_index()} of {jax.process_count()}" if several() else ""


# --- what they tell each other; every process makes the same calls in the same order


def sync(what: str = "all") -> None:
    """Go on when every process is here."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def agree(code: int) -> int:
    """The largest code of all processes."""
    if not several():
        return code
    return int(_allgather(np.int32(code)).max())


def share(value) -> list:
    """What each process gives, JSON (NaN included), in order of the processes."""
    if not several():
        return [value]
    said = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = _allgather(np.int32(said.size)).reshape(-1)
    room = 1 << int(sizes.max() - 1).bit_length()  # powers of two, so that few programs are compiled
    padded = _allgather(np.pad(said, (0, room - said.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]


def from_first(value):
    """What process 0 gives, JSON, on all."""
    return share(value if is_first() else None)[0]


def once(make: Callable[[], object]) -> None:
    """Process 0 makes it, a file say, while the others wait."""
    if is_first():
        with alone():
            make()
    sync("once")


def spread(count: int, work: Callable[[slice], list]) -> list:
    """work(slice(0, count)), `count` JSON values, of which each process does its own part and gets all."""
    if not several():
        return work(slice(0, count))
    me, n = jax.process_index(), jax.process_count()
    return [one for part in share(work(slice(me * count // n, (me + 1) * count // n))) for one in part]


def agree_on(facts: dict) -> None:
    """Raises: InputError on every process that lists the facts that are not the same on all, and where.

    facts: {name: JSON value}. Only their hash is sent if all is well.
    """
    if not several():
        return
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).digest()
    digests = _allgather(np.frombuffer(digest, np.uint8))
    if (digests == digests[0]).all():
        return
    everyone = share(json.loads(json.dumps(facts, default=str)))
    names = sorted({name for one in everyone for name in one})
    lines = []
    for fact in names:
        held = {}
        for process, one in enumerate(everyone):
            held.setdefault(json.dumps(one.get(fact, "(absent)"), sort_keys=True), []).append(process)
        if len(held) > 1:
            told = "; ".join(f"{_short(value)} on {_listed(who)}" for value, who in held.items())
            lines.append(f"  {fact}: {told}")
    more = [f"  and {len(lines) - TOLD} more"] if len(lines) > TOLD else []
    raise InputError(
        "the processes of this run do not agree:\n" + "\n".join(lines[:TOLD] + more) + "\n"
        "Start all of them with the same command, code, packages and data."
    )


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _listed(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (", ..." if len(processes) > 8 else "")
    return f"process{'es' if len(processes) > 1 else ''} {shown}"


class Vote:
    """Whether any process wants something, asked at each step and known one step later, so that nobody waits."""

    def __init__(self):
        self._before = None
        if several():
            mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
            self._split, whole = jax.NamedSharding(mesh, jax.P("all")), jax.NamedSharding(mesh, jax.P())
            self._any = jax.jit(lambda ballots: ballots.max() > 0, out_shardings=whole)

    def __call__(self, wanted: bool) -> bool:
        """The same on all processes: whether one wanted it at the call before. With one process: `wanted`."""
        if not several():
            return wanted
        ours = np.full(jax.local_device_count(), wanted, np.int32)
        ballots = jax.make_array_from_process_local_data(self._split, ours, (jax.device_count(),))
        before, self._before = self._before, self._any(ballots)
        return before is not None and bool(before)


# --- arrays


def gather(tree):
    """Host copies of a tree's arrays, whole on every process. The one way to read an array that is split over hosts.

    Waits for the device; of several processes, for what was asked of it before, too.
    """
    if not several():
        return jax.device_get(tree)
    leaves, structure = jax.tree.flatten(tree)
    split = [n for n, x in enumerate(leaves) if is_split(x)]
    if split:
        for n, whole in zip(split, _allgather([leaves[n] for n in split], tiled=True), strict=True):
            leaves[n] = whole
    return jax.tree.unflatten(structure, jax.device_get(leaves))


def is_split(x) -> bool:
    """Whether a part of the array is on devices of other processes alone."""
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


def _allgather(tree, tiled: bool = False):
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=tiled)
