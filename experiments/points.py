"""What a sweep config asks for, checked before anything runs: its points, their configs, what they share."""

import contextlib
import dataclasses
import os
import re

from experiments import cli
from rlhf_jax.errors import InputError

SHAREABLE = ("sft", "preferences", "reward_model", "gate")
KEYS = ("base", "size", "points", "seeds", "shared", "overrides")
SHARED_READ = ("model", "data", "sampling", "gold")  # by shared stages, beside their own sections


@dataclasses.dataclass(frozen=True)
class Point:
    name: str
    spec: str  # FILE.py:SIZE
    overrides: tuple[str, ...]  # KEY=VALUE, all but the seed

    def config(self, seed: int):
        return cli.load_config(self.spec, [*self.overrides, f"seed={seed}"])

    def arguments(self, seed: int, workdir: str) -> list[str]:
        """Of experiments.run."""
        flags = [f"--config.{text}" for text in (*self.overrides, f"seed={seed}")]
        return [f"--config={self.spec}", f"--workdir={workdir}", *flags]


@dataclasses.dataclass(frozen=True)
class Plan:
    points: tuple[Point, ...]
    seeds: tuple[int, ...]
    shared: Point | None  # its stages are the shared ones


def load(spec: str, overrides: list[str]) -> Plan:
    """The plan of FILE.py[:SIZE]; overrides of keys that are not the sweep's own are those of every point.
    Raises: InputError naming the file and the point, key or value; the configs of all points are checked."""
    own = [text for text in overrides if re.split(r"[.=]", text)[0] in KEYS]
    config = cli.load_config(spec, own)
    file = spec.partition(":")[0]
    if set(config) != set(KEYS):
        raise InputError(f"{file}: a sweep has the keys {', '.join(KEYS)}; this one {', '.join(config)}.")
    for key in ("points", "seeds"):
        if not isinstance(config[key], (tuple, list)) or not config[key]:
            raise InputError(f"{file}: {key} is {config[key]!r}; expected a tuple with at least one entry.")
    seeds = tuple(config.seeds)
    if not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"{file}: seeds is {seeds}; expected different whole numbers.")
    if not set(config.shared) <= set(SHAREABLE):
        raise InputError(
            f"{file}: shared is {tuple(config.shared)}; expected some of {', '.join(SHAREABLE)}."
        )
    every = (*config.overrides, *(text for text in overrides if text not in own))
    _are_overrides(f"{file}: overrides", every)
    points = tuple(_point(file, config, entry, number) for number, entry in enumerate(config.points, 1))
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{file}: two points are named {', '.join(twice)}; give each dict(name=...).")
    points = tuple(_fitting(file, point, every) for point in points)
    for text in every:
        if not any(text in point.overrides for point in points):
            with _naming(file, points[0]):
                cli.load_config(points[0].spec, [text])  # raises, and names the nearest key
    shared = None
    if config.shared:
        base = _fitting(file, Point("shared", _spec(config.base, config.size), ()), every)
        stages = tuple(stage for stage in SHAREABLE if stage in config.shared)
        shared = dataclasses.replace(base, overrides=(*base.overrides, f"stages={stages}"))
    _check(file, points, seeds[0], shared)
    return Plan(points, seeds, shared)


def _point(file, config, entry, number) -> Point:
    where = f"{file}: point {number}"
    entry = {"overrides": entry} if isinstance(entry, (str, tuple, list)) else entry
    if not hasattr(entry, "keys") or not set(entry) <= {"name", "config", "overrides"}:
        raise InputError(
            f"{where} is {entry!r}; expected KEY=VALUE, a tuple of them, or a dict of name, config, overrides."
        )
    overrides = entry.get("overrides", ())
    overrides = (overrides,) if isinstance(overrides, str) else tuple(overrides)
    _are_overrides(where, overrides)
    parts = [os.path.basename(entry["config"]).partition(".py")[0]] if "config" in entry else []
    parts += [text.partition("=")[0].split(".")[-1] + "=" + text.partition("=")[2] for text in overrides]
    name = entry.get("name") or re.sub(r"[^\w.=+-]+", "-", ",".join(parts)) or "base"
    if not re.fullmatch(r"[\w=+-][\w.,=+-]*", name):
        raise InputError(f"{where}: its name {name!r} is to be a directory; use letters, digits and ._=+-")
    return Point(name, _spec(entry.get("config", config.base), config.size), overrides)


def _spec(path: str, size: str) -> str:
    return path if ":" in path or not size else f"{path}:{size}"


def _are_overrides(where, overrides):
    for text in overrides:
        if not isinstance(text, str) or "=" not in text:
            raise InputError(f"{where}: override {text!r}; expected KEY=VALUE as a string.")
        if text.startswith(("seed=", "stages=")):
            raise InputError(f"{where}: {text} is the sweep's to say; use its key seeds, or another config.")


@contextlib.contextmanager
def _naming(file, point):
    try:
        yield
    except InputError as error:
        raise InputError(f"{file}: point {point.name} ({point.spec}): {error}") from None


def _fitting(file, point: Point, every) -> Point:
    """With those of the overrides whose section its config has, and with the stage `evaluation`."""
    with _naming(file, point):
        config = cli.load_config(point.spec, [])
    fitting = tuple(text for text in every if re.split(r"[.=]", text)[0] in config)
    stages = tuple(config.stages)
    last = () if "evaluation" in stages else (f"stages={(*stages, 'evaluation')}",)
    return dataclasses.replace(point, overrides=(*last, *fitting, *point.overrides))


def _check(file, points, seed, shared):
    from experiments.pipeline import STAGES  # imports jax
    from rlhf_jax.training.checks import check_config

    loaded = []
    for point in (*points, *([shared] if shared else [])):
        with _naming(file, point):
            config = point.config(seed)
            check_config(config, tuple(STAGES))
        loaded.append(config)
    if not shared:
        return
    base = loaded.pop()
    read = (*SHARED_READ, *base.stages)
    # What is said of the samples is what that kind reads.
    also = ("reward_model.kind", "reward_model.objective") if "preferences" in base.stages else ()
    below = lambda config: {
        key: x for key, x in cli.flat(config).items() if key.split(".")[0] in read or key in also
    }
    for point, config in zip(points, loaded, strict=True):
        once, its = below(base), below(config)
        differ = sorted(key for key in once.keys() & its.keys() if once[key] != its[key])
        if differ:
            raise InputError(
                f"{file}: point {point.name} changes {', '.join(differ)}, which the shared stages "
                f"{', '.join(base.stages)} read; take those stages out of `shared`."
            )
