"""The smallest change to a config that makes it fit, found by compiling it; and other meshes and batches, ranked.

Knows which keys cost memory and what a change of them costs; what a config needs is planning.py's to say."""

import math

from rlhf_jax.errors import InputError
from rlhf_jax.parallel import sharding
from rlhf_jax.parallel.chips import Slice
from rlhf_jax.training import phases, planning
from rlhf_jax.training.planned import PlannedRun


def changed(config, changes: dict):
    """A copy with {dotted key: value}."""
    made = config.copy_and_resolve_references()
    with made.unlocked():
        for key, value in changes.items():
            *path, leaf = key.split(".")
            node = made
            for name in path:
                node = node[name]
            node[leaf] = value
    return made


def written(changes: dict) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def fix(
    config,
    devices,
    where: Slice,
    others: dict,
    failing: list[planning.Found],
    limit: int,
    tell=lambda text: None,
):
    """({key: value}, what the failing phases then need in bytes a chip) or None.

    Cheapest first: what costs nothing, then time (recomputing, smaller pieces), then what the run learns from (smaller
    batches), then another mesh. Each is compiled; one that changes more than the phases that fail is compiled whole.
    failing: phases that do not fit. limit: of compilations.
    """
    stages, left = {one.stage.name for one in failing}, limit
    for changes in candidates(config, failing, where):
        if left <= 0:
            return None
        try:
            run = PlannedRun(changed(config, changes), devices)
            found = phases.of_config(run, others, stages)
        except InputError:
            continue
        wanted = {(one.stage.name, one.phase.name) for one in failing}
        everything = any(key.startswith(("mesh.", "model.quantise")) for key in changes)
        largest = 0.0
        for stage in found:
            for phase in stage.phases:
                if not everything and (stage.name, phase.name) not in wanted:
                    continue
                tell(f"trying {written(changes)}: {stage.name}: {phase.name}")
                one = planning.measure(run, stage, phase, where)
                left -= 1
                largest = max(largest, one.bytes)
                if not one.fits(where):
                    break
            else:
                continue
            break
        else:
            return changes, largest
    return None


def candidates(config, failing, where: Slice):
    """{key: value} each, cheapest first; later ones on top of what saves memory at the price of time alone."""
    names = list(dict.fromkeys(one.stage.name for one in failing))
    model, free = config.model, {}
    if model.vocab_chunk == 0:
        free["model.vocab_chunk"] = 8192
        yield dict(free)
    if model.remat != "full":
        free["model.remat"] = "full"
        yield dict(free)
    ways = _ways(config, where)
    trained = [name for name in names if name in config and "num_microbatches" in config[name]]
    pieces = {name: config[name].num_microbatches for name in trained}
    while trained:
        for name in trained:
            rows = config[name].batch_size // (config[name].get("num_minibatches", 1) * pieces[name])
            if rows % (2 * ways) == 0:
                pieces[name] *= 2
                free[f"{name}.num_microbatches"] = pieces[name]
            else:
                trained = [other for other in trained if other != name]
        if trained:
            yield dict(free)
    if "quantise" in model and not model.quantise:
        yield free | {"model.quantise": "int8"}
    sized = {
        name: config[name].batch_size for name in names if name in config and "batch_size" in config[name]
    }
    for _ in range(3):
        smaller = {n: size // 2 for n, size in sized.items() if size % 2 == 0 and size // 2 % ways == 0}
        if not smaller:
            break
        sized |= smaller
        rows = {f"{name}.batch_size": size for name, size in sized.items()}
        single = {f"{name}.num_microbatches": 1 for name in sized if "num_microbatches" in config[name]}
        yield free | single | rows
    for tensor in (2, 4, 8):
        if tensor > config.mesh.tensor and where.devices % (tensor * max(config.mesh.data, 1)) == 0:
            yield free | {"mesh.fsdp": -1, "mesh.tensor": tensor}


def _ways(config, where: Slice) -> int:
    axes = dict(sharding.RULES)["batch"]
    sizes = {name: config.mesh[name] for name in ("data", "fsdp", "tensor")}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: where.devices // fixed if size == -1 else size for name, size in sizes.items()}
    return math.prod(sizes[axis] for axis in axes)


def search(
    config, devices, where: Slice, others: dict, name: str, limit: int, tell=lambda text: None
) -> list[dict]:
    """Meshes and batches for the stage `name`, those that fit first, the fastest first.

    Returns: [{"changes", "fits", "bytes", "completions_per_second"}]; of the bound. limit: of compilations.
    """
    tried, left = [], limit
    for changes in meshes_and_batches(config, where, name):
        try:
            run = PlannedRun(changed(config, changes), devices)
            (stage,) = phases.of_config(run, others, {name})
        except InputError:
            continue
        # Those of one step, the largest last: it decides whether the rest is worth compiling.
        steps = [phase for phase in stage.phases if phase.calls >= stage.steps]
        if len(steps) > left:
            break
        largest, seconds, fits = 0.0, 0.0, True
        for phase in reversed(steps):
            tell(f"search, {limit - left} of {limit} compilations: {written(changes)}: {phase.name}")
            one = planning.measure(run, stage, phase, where)
            left -= 1
            largest, seconds = max(largest, one.bytes), seconds + one.seconds
            fits = one.fits(where)
            if not fits:
                break
        made = run.config[name].batch_size * run.config[name].get("num_completions", 1)
        tried.append({
            "changes": changes,
            "fits": fits,
            "bytes": largest,
            "step_bound_seconds": seconds if fits else None,
            "completions_per_second": made / seconds if fits and seconds else None,
        })  # fmt: skip
    return sorted(tried, key=lambda one: (not one["fits"], -(one["completions_per_second"] or 0)))


def meshes_and_batches(config, where: Slice, name: str):
    """Shapes of the mesh at the batch of the config, then the same at twice as many prompts."""
    size, n = config[name].batch_size, where.devices
    shapes = []
    for tensor in (1, 2, 4, 8, 16, 32):
        for data in (1, 2, 4):
            fsdp = n // (tensor * data)
            if fsdp and fsdp * tensor * data == n and (data == 1 or fsdp > 1):
                shapes.append((data, fsdp, tensor))
    shapes.sort()
    for factor in (1, 2):
        for data, fsdp, tensor in shapes:
            if size * factor % (data * fsdp) == 0:
                changes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
                yield changes | ({f"{name}.batch_size": size * factor} if factor > 1 else {})
