"""Plans: a small config compiled whole for a TPU slice, where there is its compiler; phases of every sort of config."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from experiments import cli, phases, planner
from rlhf_jax.checkpoints import huggingface
from rlhf_jax.errors import InputError
from rlhf_jax.parallel import aot, chips, flops
from rlhf_jax.parallel import mesh as meshes
from rlhf_jax.training import plan_fixes
from rlhf_jax.training.phases import of_config
from rlhf_jax.training.planned import PlannedRun

CONFIG = "configs/ppo.py:tiny"
NO_COMPILER = "the TPU compiler is not installed: pip install 'rlhf_jax[plan]'"
# Compiles the same programs in half the time, less well.
QUICK = {"JAX_OPTIMIZATION_LEVEL": "O0", "JAX_MEMORY_FITTING_LEVEL": "O0"}


def command(*flags):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | QUICK
    return subprocess.run(
        [sys.executable, "-m", "experiments.plan", *flags], capture_output=True, text=True, env=environment
    )


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=NO_COMPILER)
def test_a_small_config_is_planned_whole():
    made = command(f"--config={CONFIG}", "--topology=v5e:2x2", "--json", "--config.sft.steps=7")
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)  # one object and nothing else
    assert found["fits"] and found["chips"] == 4 and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert found["overrides"] == ["sft.steps=7"] and found["assumptions"] and found["change"] is None
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["sft", "preferences", "reward_model", "gate", "ppo"]
    assert stages["sft"]["steps"] == 7
    names = [phase["name"] for phase in stages["ppo"]["phases"]]
    assert names == ["rollout", "reward scoring", "reference scoring, targets", "update", "reference rollout"]
    for stage in stages.values():
        for phase in stage["phases"]:
            assert phase["flops"] > 0 and phase["hbm_bytes"] > 0 and phase["compile_seconds"] > 0
            assert phase["collectives"]["all-gather"]["bytes"] > 0  # of weights, which lie in four parts
            assert phase["bound_seconds"] > 0 and phase["binds"] in ("compute", "memory", "interconnect")
            parts = ("arguments_bytes", "temporaries_bytes", "outputs_bytes", "beside_bytes")
            assert phase["bytes"] == sum(phase[name] for name in parts) <= found["hbm_bytes"]
    rollout, update = stages["ppo"]["phases"][0], stages["ppo"]["phases"][3]
    prefill, decode = rollout["parts"]["prefill"], rollout["parts"]["decode"]
    assert (
        rollout["flops"] == prefill["flops"] + decode["flops"] and min(prefill["flops"], decode["flops"]) > 0
    )
    # What the update keeps, moments of AdamW, lies beside the rollout; the update itself is handed nearly all.
    assert rollout["beside_bytes"] > update["beside_bytes"]
    step = stages["ppo"]["step_bound_seconds"]
    once = [phase["bound_seconds"] for phase in stages["ppo"]["phases"][:4]]
    assert step == pytest.approx(sum(once))
    assert stages["ppo"]["expected_hours"] > 24 * step / 0.5 / 3600  # and the statistics of the reference


@pytest.mark.parametrize(
    "config, stage, overrides",
    [
        ("configs/quark.py", "quark", []),
        ("configs/trpo.py", "trpo", []),
        ("configs/remax.py", "remax", ["remax.eval_every_steps=4"]),
        ("configs/ppo_ptx.py", "ppo_ptx", ["ppo_ptx.value=own"]),
        ("configs/reward_models/multi_objective.py", "reward_model", ["reward_model.members=2"]),
        ("configs/dpo.py", "dpo", ["dpo.reference_sync_steps=2"]),
        ("configs/dpo.py", "dpo", ["dpo.reference=cached"]),
        ("configs/sft.py", "sft", ["sft.packed_tokens=64"]),
    ],
)
def test_phases_are_called_as_the_run_calls_them(config, stage, overrides):
    """Each program can be traced with the arguments that the plan has for it, on eight devices."""
    run = PlannedRun(cli.load_config(f"{config}:tiny", overrides), jax.devices())
    (found,) = of_config(run, phases.STAGES, {stage})
    assert found.phases and aot.bytes_of(found.resident) > 0
    for phase in found.phases:
        assert phase.calls > 0
        with meshes.activate(run.mesh):
            traced = phase.function.trace(*phase.arguments)
        assert phase.name in ("selection", "targets") or flops.count(traced.jaxpr, phase.trips).total > 0


def test_what_cannot_be_planned_is_said():
    run = PlannedRun(cli.load_config("configs/reward_models/pairrm.py:tiny", []), jax.devices())
    (found,) = of_config(run, phases.STAGES, {"reward_model"})
    assert not found.phases and "pairrm" in found.unplanned[0]


def test_the_published_sizes_need_no_hub():
    run = PlannedRun(cli.load_config("configs/ppo.py:llama2_70b", []), jax.devices())
    assert sum(x.size for x in jax.tree.leaves(run.base)) == 68_976_648_192
    # All but the norms, which are whole everywhere, is in eight parts.
    assert aot.bytes_of(run.base) < 1.001 * 2 * 68_976_648_192 / 8


def test_changes_are_tried_from_the_cheapest():
    config = cli.load_config("configs/ppo.py:llama2_7b", [])
    (stage,) = (
        one for one in of_config(PlannedRun(config, jax.devices()), phases.STAGES) if one.name == "ppo"
    )
    failing = [_Failing(stage)]
    tried = list(plan_fixes.candidates(config, failing, chips.parse("v5e:4x4")))
    assert tried[0] == {"model.vocab_chunk": 8192}
    assert tried[1]["ppo.num_microbatches"] == 4 and tried[1]["model.vocab_chunk"] == 8192
    assert any(one.get("ppo.batch_size") == 32 for one in tried) and tried[-1]["mesh.tensor"] == 8
    made = plan_fixes.changed(config, tried[1])
    assert made.ppo.num_microbatches == 4 and config.ppo.num_microbatches == 2


class _Failing:
    """A phase that does not fit."""

    def __init__(self, stage, phase=None):
        self.stage, self.phase = stage, phase


def test_the_first_change_that_fits_is_told(monkeypatch):
    """Of a compiler for which the update fits in eight pieces of half as many prompts."""
    config, compiled = cli.load_config("configs/ppo.py:llama2_7b", ["model.vocab_chunk=8192"]), []
    (stage,) = of_config(PlannedRun(config, jax.devices()), phases.STAGES, {"ppo"})
    update = next(phase for phase in stage.phases if phase.name == "update")
    fitting = {"ppo.num_microbatches": 8}

    def measure(run, stage, phase, where):
        compiled.append(phase.name)
        fits = all(run.config.ppo[key.split(".")[1]] == value for key, value in fitting.items())
        found = _Failing(stage, phase)
        found.bytes, found.fits = (1.0 if fits else 1e12), lambda where: fits
        return found

    monkeypatch.setattr(plan_fixes.planning, "measure", measure)
    ask = lambda limit: plan_fixes.fix(
        config, jax.devices(), chips.parse("v5e:2x4"), phases.STAGES, [_Failing(stage, update)], limit
    )
    assert ask(24) == ({"ppo.num_microbatches": 8}, 1.0)
    assert compiled == ["update", "update"]  # 4 pieces, then 8: of the phase that failed alone
    fitting["ppo.batch_size"] = -1  # nothing fits
    assert ask(3) is None and len(compiled) == 5


def test_a_model_that_is_nowhere_is_told():
    with pytest.raises(InputError, match="org/none.*could not be fetched"):
        huggingface.shape_of("org/none")
    assert huggingface.shape_of("llama-2-13b-chat").num_layers == 40


def test_bad_usage_is_told():
    config = cli.load_config(CONFIG, [])
    with pytest.raises(InputError, match="'v9:2x2'.*v5e:"):
        planner.plan(config, "v9:2x2")
    with pytest.raises(InputError, match="--stages: 'dpo'"):
        planner.plan(config, "v5e:2x2", stages=("dpo",))
    with pytest.raises(InputError, match="--efficiency"):
        planner.plan(config, "v5e:2x2", efficiency=0.0)


def test_without_the_compiler_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(InputError, match=r"pip install 'rlhf_jax\[plan\]'"):
        planner.plan(cli.load_config(CONFIG, []), "v5e:2x2")


def test_rows_that_cannot_be_split_are_told():
    config = cli.load_config(CONFIG, ["ppo.batch_size=12"])
    with pytest.raises(InputError, match="a batch of 12 rows cannot be split over 8 devices"):
        of_config(PlannedRun(config, jax.devices()), phases.STAGES)


def test_meshes_are_ranked_by_speed_among_those_that_fit(monkeypatch):
    """Of a chip on which wider tensor axes are faster, and 4 of them do not fit."""
    config = cli.load_config(CONFIG, [])

    def measure(run, stage, phase, where):
        found, tensor = _Failing(stage, phase), run.mesh.shape["tensor"]
        found.bytes, found.seconds, found.fits = 1.0, 1.0 / tensor, lambda where: tensor != 4
        return found

    monkeypatch.setattr(plan_fixes.planning, "measure", measure)
    ask = lambda limit: plan_fixes.search(
        config, jax.devices()[:4], chips.parse("v5e:2x2"), phases.STAGES, "ppo", limit
    )
    ranked = ask(1000)
    best = ranked[0]
    assert best["fits"] and best["changes"]["mesh.tensor"] == 2 and best["changes"]["ppo.batch_size"] == 64
    # Rollout, reward, reference and update, half a second each; two completions a prompt.
    assert best["step_bound_seconds"] == 2.0 and best["completions_per_second"] == 64
    fitting = [one["fits"] for one in ranked]
    assert fitting == sorted(fitting, reverse=True) and not fitting[-1]
    assert len(ask(8)) == 2
