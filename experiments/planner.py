"""From a config and the name of a slice to its plan, a change that would fit, and a ranking of others."""

import jax

from experiments import phases as own
from experiments import pipeline
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import chips
from rlhf_jax.training import phases, plan_fixes, planning
from rlhf_jax.training.algorithms import ALGORITHMS
from rlhf_jax.training.checks import check_config
from rlhf_jax.training.planned import PlannedRun

MISSING = (
    "the TPU compiler is not installed: pip install 'rlhf_jax[plan]' (or pip install libtpu), on any Linux machine; no "
    "TPU is needed."
)


def plan(
    config, topology: str, *, stages=(), search=False, limit=24, efficiency=0.5, tell=lambda text: None
) -> dict:
    """The plan as JSON. Raises: InputError naming what is wrong.

    stages: only these of config.stages. limit: of the compilations of a search, or of finding what fits.
    """
    check_config(config, tuple(pipeline.STAGES))
    if not 0 < efficiency <= 1:
        raise InputError(f"--efficiency is {efficiency}; expected above 0, at most 1.")
    unknown = [name for name in stages if name not in config.stages]
    if unknown:
        raise InputError(f"--stages: {unknown[0]!r} is none of config.stages {tuple(config.stages)}.")
    where = chips.parse(topology)
    try:
        devices = chips.describe(where)
    except ModuleNotFoundError:
        raise InputError(MISSING) from None
    jax.config.update("jax_enable_compilation_cache", False)  # described devices cannot read it
    if stages:
        config = plan_fixes.changed(config, {"stages": tuple(n for n in config.stages if n in stages)})
    run = PlannedRun(config, devices)
    _ = run.mesh, run.model  # a mesh or a model that is wrong is told before anything is compiled
    planned = phases.of_config(run, own.STAGES)
    found = planning.of_stages(run, planned, where, tell)
    told = planning.report(run, planned, found, where, efficiency)
    failing = [one for one in found if not one.fits(where)]
    told["change"] = None
    if failing:
        fix = plan_fixes.fix(config, devices, where, own.STAGES, failing, limit, tell)
        if fix is not None:
            changes, bytes_ = fix
            told["change"] = {"keys": changes, "flags": plan_fixes.written(changes), "bytes": bytes_}
    if search:
        names = [name for name in config.stages if name in ALGORITHMS]
        if not names:
            raise InputError("--search: none of the stages trains, so there is nothing to rank.")
        ranked = plan_fixes.search(config, devices, where, own.STAGES, names[-1], limit, tell)
        told["search"] = {"stage": names[-1], "ranked": ranked}
    return told
