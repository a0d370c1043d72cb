"""What a workdir says about itself: config.json, environment.json, timing.json. A run of another config is refused.

Of several processes the first one writes; all of them must see the same directory."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import secrets
import socket
import time

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import hosts

MAY_CHANGE = (
    "logging.",
    "evaluation.",
    "gate.",
    "stages",
)  # keys that a resumed run may have otherwise than before
SHARED, VISIBLE_SECONDS = ".shared", 30.0  # a network file system may show a new file late
PACKAGES = ("rlhf_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def agree_on_run(config: dict, workdir: str) -> None:
    """Before anything is written: all processes have one config, the same packages, and one workdir.

    Raises: InputError, on every process, that says what differs on which.
    """
    if not hosts.several():
        return
    facts = {f"config.{key}": value for key, value in flat(_as_read_back(config)).items()}
    facts |= {f"package {name}": version for name, version in _versions().items()}
    hosts.agree_on(facts)
    path, number = os.path.join(workdir, SHARED), hosts.from_first(secrets.token_hex(8))
    if hosts.is_first():
        with open(path, "w", encoding="utf-8") as file:
            file.write(number)
    hosts.sync("workdir")
    seen = hosts.share([_shows(path, number), socket.gethostname()])
    if hosts.is_first():
        os.remove(path)
    blind = [f"process {n} (host {host})" for n, (saw, host) in enumerate(seen) if not saw]
    if blind:
        raise InputError(
            f"--workdir: what process 0 (host {seen[0][1]}) writes to {os.path.abspath(workdir)} is not seen by "
            f"{', '.join(blind[:8])}{', ...' if len(blind) > 8 else ''}. All processes need one directory: give one on "
            "a file system that all hosts mount."
        )


def _shows(path: str, content: str) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
            if file.read() == content:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def settle_config(config: dict, workdir: str, keep: tuple[str, ...] = ()) -> list[str]:
    """Write config.json, or compare with the one that is there.

    Args:
      keep: sections whose values stay as they are there, because what they led to is done.
    Returns: a line for each key of `keep` that differs.
    Raises: InputError listing each key that differs, unless a resumed run may change it.
    """
    path, now, kept = os.path.join(workdir, "config.json"), _as_read_back(config), []
    # A run that ended before it made anything (a wrong path, say) may be corrected in place.
    begun = set(os.listdir(workdir)) - {"config.json", "environment.json", "timing.json", ".lock", SHARED}
    if begun and os.path.exists(path):
        differ = differences(config, workdir)
        if differ:
            raise InputError(
                f"{path}: this workdir was begun with another config:\n" + "\n".join(differ) + "\n"
                "Use another --workdir, or the config it was begun with."
            )
        before = read_json(path)
        for section in keep:
            kept += _differences({section: before[section]}, {section: now[section]}, may_change=())
            now[section] = before[section]
    write_json(path, now)
    return kept


def differences(config: dict, workdir: str) -> list[str]:
    """A line for each key whose value is not that of the workdir's config.json, but for those that may change."""
    return _differences(read_json(os.path.join(workdir, "config.json")), _as_read_back(config), MAY_CHANGE)


def _differences(before: dict, now: dict, may_change: tuple[str, ...]) -> list[str]:
    was, become = flat(before), flat(now)
    return [
        f"  {key}: was {was.get(key)!r}, is {become.get(key)!r}"
        for key in sorted(was.keys() | become.keys())
        if was.get(key) != become.get(key) and not key.startswith(may_change)
    ]


def _as_read_back(config: dict) -> dict:
    return json.loads(json.dumps(config))  # tuples as lists


def flat(tree: dict, prefix: str = "") -> dict:
    """{dotted key: value} of the leaves."""
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def write_environment(workdir: str, config: dict, command: str) -> None:
    """environment.json: versions, devices, seed, the command to run again. No environment variables: they may hold
    secrets."""
    import jax

    devices = jax.devices()
    write_json(
        os.path.join(workdir, "environment.json"),
        {
            "versions": _versions(),
            "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
            "processes": jax.process_count(),
            "cpu_count": os.cpu_count(),
            "seed": config["seed"],
            "command": command,
            "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        },
    )


@contextlib.contextmanager
def phase(workdir: str, name: str):
    """Adds the wall time of a phase to timing.json, also when it is interrupted; with the peak memory so far."""
    began = time.monotonic()
    try:
        yield
    finally:
        timing = _timing(workdir)
        seconds = dict(timing["phases"])
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - began, 2)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = max(peak, timing["peak_memory_bytes"])
        note_timing(workdir, phases=list(seconds.items()), peak_memory_bytes=memory)


def note_timing(workdir: str, **figures) -> None:
    """Into timing.json, in the place of those of the same names."""
    write_json(os.path.join(workdir, "timing.json"), _timing(workdir) | figures)


def _timing(workdir: str) -> dict:
    timing = {"phases": [], "peak_memory_bytes": 0}
    with contextlib.suppress(OSError, ValueError):  # a damaged one is begun anew: times end no run
        with open(os.path.join(workdir, "timing.json"), encoding="utf-8") as file:
            timing = json.load(file)
    return timing


def read_json(path: str):
    """Raises: InputError naming the file if it is no JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}). Put a copy of it back, or take another --workdir."
        ) from None


def write_json(path: str, content) -> None:
    """Whole or not at all, by the first process."""
    if not hosts.is_first():
        return
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
    os.replace(path + ".new", path)


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
