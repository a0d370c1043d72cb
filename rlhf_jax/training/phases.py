"""What a config computes on the device: for each stage its programs, what they are called with, and how often.

The functions are those that the stages call, from the same builders; the arguments are shapes on a described slice
(planned.py). Compiles nothing. The stages that only experiments knows, gate and evaluation, are in
experiments/phases.py."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import readout
from rlhf_jax.models.readout import Readout
from rlhf_jax.models.roles import Role
from rlhf_jax.sampling.generate import generate
from rlhf_jax.training import offline, online, preferences, reward_stage, rollout
from rlhf_jax.training import reference as references
from rlhf_jax.training.algorithms import ALGORITHMS, preference
from rlhf_jax.training.algorithms.gating import GATING, whole
from rlhf_jax.training.algorithms.reward_models import KINDS, TEXT_KINDS
from rlhf_jax.training.planned import PlannedRun
from rlhf_jax.training.run import settings_of
from rlhf_jax.training.scoring import LEARNED
from rlhf_jax.types import GroupedBatch

MARKER_TOKENS = 8  # that a quantile's text is taken to have; only its tokenizer knows


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program of a stage."""

    name: str
    function: Any  # jitted
    arguments: tuple
    calls: float  # in the whole stage
    tokens: int = 0  # that one call makes, or learns from, in completions
    trips: int = 1  # of its loops that the data end, at most
    samples: bool = False  # prefill, then a loop that decodes


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    phases: tuple[Phase, ...] = ()
    resident: Any = ()  # what lies on the chips through all of it, whichever phase runs
    unplanned: tuple[str, ...] = ()  # what it also does, and why nothing is said of it


def of_config(run: PlannedRun, others: dict, names=None) -> list[Stage]:
    """The stages of config.stages, or those of `names`. others: {name: run -> Stage} of those that are not training's.

    Raises: InputError if the batches of one cannot be placed on the mesh.
    """
    return [(others | STAGES)[name](run) for name in run.config.stages if names is None or name in names]


# Batches and roles


def group(run: PlannedRun, B: int, G: int, R: int, *, P: int | None = None, **more) -> GroupedBatch:
    """Records, as offline.grouped makes them."""
    prompt, completion = (B, run.prompt_length if P is None else P), (B, G, R)
    return GroupedBatch(
        run.rows(*prompt),
        run.rows(*prompt),
        run.rows(*completion),
        run.rows(*completion),
        weights=run.rows(B, G, dtype=jnp.float32),
        **more,
    )


def prompts(run: PlannedRun, B: int, more: int = 0):
    return run.rows(B, run.prompt_length + more), run.rows(B, run.prompt_length + more)


def sampling_phase(run, name, network, policy, asked, sampling, calls, head=None, base=None) -> Phase:
    # Where all completions have the same length, these only change how the loop is written.
    sampling = dataclasses.replace(sampling, slots=0, halvings=0)
    B, R = asked[0].shape[0], sampling.max_new_tokens
    arguments = (
        network.model,
        policy.params(run.raw_base),
        *asked,
        run.key,
        sampling,
        policy.adapter,
        head,
    )
    made = B * sampling.num_completions * R
    return Phase(name, generate, arguments, calls, made, trips=max(R - 1, 1), samples=True)


def sampled(run, network, policy, asked, sampling, head=None, read=None) -> GroupedBatch:
    """What rollout.sample gives."""
    made = jax.eval_shape(
        lambda base, policy, asked, key, head, read: rollout.sample(
            network, base, policy, asked, key, sampling, head, read
        ),
        run.raw_base,
        policy,
        asked,
        run.key,
        head,
        read,
    )
    return run.as_batch(made)


def reward_role(run: PlannedRun) -> Role | None:
    """The learned reward as RL is handed it; None where there is none, or it is no role of the run's decoder."""
    if LEARNED not in run.config.rewards.components or "reward_model" not in run.config:
        return None
    section = run.config.reward_model
    if section.kind in TEXT_KINDS:
        return None
    settings = settings_of("reward_model", section)
    members = tuple(_member(run, section, settings) for _ in range(settings.members))
    if settings.members == 1:
        return members[0]
    numbers = jax.ShapeDtypeStruct((settings.members,), jnp.float32)
    return Role(
        head=run.everywhere({"mean": numbers, "std": numbers}),
        members=members,
        readout=Readout(settings.combine, spread_coeff=settings.spread_coeff),
    )


def _member(run, section, settings) -> Role:
    """Trained, with its gate if it has one."""
    kind = KINDS[settings.kind]
    outputs = _outputs(run, settings)
    make = lambda: {"reward": reward_stage.first_role(run, section, settings, outputs)}
    role = run.roles(make)["reward"]
    if not kind.gated:
        return role
    gated = reward_stage.gated_readout(settings, _aspects(run, settings))
    head = dict(role.head)
    if gated.verbosity is not None:
        head["penalty"] = run.everywhere(jax.ShapeDtypeStruct((outputs,), jnp.float32))
    return role.replace(readout=gated, head=head, gate=_gate(run, settings, outputs).gate)


def _gate(run, settings, outputs) -> Role:
    make = lambda: {
        "reward": Role(
            gate=readout.init_gate(
                run.rng("reward_model"),
                run.model.config.hidden_size,
                outputs,
                settings.gate_width,
                settings.gate_layers,
            )
        )
    }
    return run.roles(make)["reward"]


def _aspects(run, settings) -> tuple[str, ...]:
    return tuple(settings.aspects or run.config.preferences.aspects)


def _outputs(run, settings) -> int | None:
    return {"classification": 2, "multi_objective": len(_aspects(run, settings))}.get(settings.kind)


# Stages that learn from records


def _fit(run, name, batch, trained, frozen, algorithm=None, section=None, read=None, times=1, label=""):
    """(phases, state) of offline.fit."""
    section = run.config[name] if section is None else section
    algorithm, settings = algorithm or ALGORITHMS[name], settings_of(name, section)
    objective = functools.partial(algorithm.objective, settings, run.network())
    update, optimizer, _ = offline.updater(run, section, settings, objective)
    reference, given, phases = None, frozen, []
    tokens, label = _tokens(batch), f"{label} " if label else ""
    if settings.reference_sync_steps:
        make = lambda role: {"reference": references.follower(role, run.base, settings.reference_sync_mix)}
        reference = run.roles(make, trained["policy"])["reference"]
        given = frozen | {"reference": reference}
    held_out = -(-run.config.data.held_out_pairs // section.batch_size) if name != "sft" else 0
    passes = max(section.steps // section.eval_every_steps if section.eval_every_steps else 1, 1)
    if settings.reference == "cached":
        records = run.config.preferences.num_pairs
        logprobs = references.make_logprobs(run.network())
        arguments = (run.raw_base, batch)
        calls = -(-records // section.batch_size) + held_out
        phases.append(Phase("reference log-probabilities", logprobs, arguments, calls, tokens))
        batch = batch.replace(ref_logprobs=run.rows(*batch.completion_ids.shape, dtype=jnp.float32))
    state = run.state(trained, optimizer, {}, reference=reference)
    calls = times * section.steps
    phases.append(Phase(f"{label}update", update, (state, frozen, batch), calls, tokens))
    if held_out:
        measure = offline.make_measure(objective, read)
        arguments = (trained, given, batch)
        phases.append(Phase(f"{label}held-out", measure, arguments, times * passes * held_out, tokens))
    return phases, state


def _tokens(batch) -> int:
    return math.prod(batch.completion_ids.shape)


def sft(run: PlannedRun) -> Stage:
    section, R = run.config.sft, run.config.data.completion_tokens + 1
    trained = run.roles(lambda: {"policy": run.new_role(run.rng("sft"), section.train, run.base)})
    if section.packed_tokens:
        size, packed = section.batch_size, section.packed_tokens
        batch = group(run, size, 1, packed, P=1, segments=run.rows(size, 1, packed))
    else:
        batch = group(run, section.batch_size, 1, R)
    frozen = {"base": None if section.train == "full" else run.raw_base}
    phases, state = _fit(run, "sft", batch, trained, frozen)
    return Stage("sft", section.steps, tuple(phases), (run.raw_base, state))


def make_preferences(run: PlannedRun) -> Stage:
    section = run.config.preferences
    kind = preferences.kind_of(run)
    samples = {"ranking": section.ranking_size}.get(kind, 2)
    asked, network, sampling = prompts(run, section.batch_size), run.network(), run.sampling(samples)
    files = 2 if kind == "multi_objective" else 1
    counts = (section.num_pairs, run.config.data.held_out_pairs)
    calls = sum(-(-(2 * count // samples) // section.batch_size) for count in counts) * files
    phase = sampling_phase(run, "sampling", network, Role(), asked, sampling, calls)
    unplanned = ()
    if section.labeller:
        unplanned = (f"the labeller {section.labeller!r}, which has weights and a tokenizer of its own",)
    return Stage("preferences", calls, (phase,), (run.raw_base,), unplanned)


def reward_model(run: PlannedRun) -> Stage:
    section = run.config.reward_model
    if section.kind in TEXT_KINDS:
        why = f"config.reward_model.kind {section.kind!r} has a tokenizer of its own: lengths are known from its data"
        return Stage("reward_model", section.steps, unplanned=(why,))
    settings = settings_of("reward_model", section)
    outputs, R = _outputs(run, settings), run.config.data.completion_tokens + 1
    G = {"ranking": run.config.preferences.ranking_size}.get(settings.kind, 2)
    G = 1 if settings.kind in ("classification", "regression", "multi_objective") else G
    more, B = {}, section.batch_size
    if G == 1 or settings.kind == "ranking":
        shape = (B, G, outputs if settings.kind == "multi_objective" else 1)
        more = {name: run.rows(*shape, dtype=jnp.float32) for name in ("targets", "target_mask")}
    trained = run.roles(
        lambda: {"reward": reward_stage.first_role(run, section, settings, outputs)},
    )
    frozen = {"base": run.raw_base}
    read = lambda trained, frozen, batch: reward_stage.read(
        run.model, trained["reward"], frozen["base"], batch
    )
    batch = group(run, B, G, R, **more)
    phases, state = _fit(run, "reward_model", batch, trained, frozen, read=read, times=settings.members)
    resident, steps = [run.raw_base, state], section.steps * settings.members
    if KINDS[settings.kind].gated:
        aspects = _member(run, section, settings).replace(gate=None)
        part = section.copy_and_resolve_references()
        with part.unlocked():
            part.steps, part.optimizer.learning_rate = settings.gate_steps, settings.gate_learning_rate
        more, gate_state = _fit(
            run,
            "reward_model",
            group(run, B, 2, R),
            {"reward": _gate(run, settings, outputs)},
            {"base": run.raw_base, "aspects": aspects},
            GATING,
            part,
            read=lambda trained, frozen, batch: reward_stage.read(
                run.model, whole(trained, frozen), frozen["base"], batch
            ),
            times=settings.members,
            label="gate",
        )
        phases, steps = [*phases, *more], steps + settings.gate_steps * settings.members
        del gate_state  # smaller than the state of the aspects, which is gone by then
    if settings.members > 1:
        resident.append(tuple(_member(run, section, settings) for _ in range(settings.members - 1)))
    return Stage("reward_model", steps, tuple(phases), tuple(resident))


def on_preferences(run: PlannedRun, name: str) -> Stage:
    section = run.config[name]
    trained = run.roles(lambda: {"policy": run.new_role(run.rng(name), section.train, run.base)})
    batch = group(run, section.batch_size, 2, run.config.data.completion_tokens + 1)
    phases, state = _fit(run, name, batch, trained, {"base": run.raw_base})
    return Stage(name, section.steps, tuple(phases), (run.raw_base, state))


# Stages that learn from samples


def on_samples(run: PlannedRun, name: str) -> Stage:
    section = run.config[name]
    algorithm, settings = ALGORITHMS[name], settings_of(name, section)
    network, sampling = run.network(run.config.sampling.temperature), run.sampling(section.num_completions)
    learned, reward = LEARNED in run.config.rewards.components, reward_role(run)
    base, B, unplanned = run.raw_base, section.batch_size, unplanned_rewards(run, reward)
    trained = run.roles(
        lambda reward: online.first_roles(run, section, algorithm, run.rng(name), reward), reward
    )
    P, R = run.prompt_length, run.config.data.completion_tokens
    memory, marker = None, 0
    if algorithm.memory is not None:
        marker = MARKER_TOKENS
        markers = (jax.ShapeDtypeStruct((section.num_quantiles, marker), jnp.int32),) * 2
        memory = jax.eval_shape(lambda *markers: algorithm.memory(settings, markers, P, R), *markers)
    update, optimizer, auxiliary = None, None, None
    if algorithm.auxiliary_objective is not None:
        auxiliary = functools.partial(algorithm.auxiliary_objective, settings, network)
    update, optimizer, _ = online.updater(section, algorithm, settings, network, auxiliary)
    controllers = online.first_controllers(algorithm, settings)
    state = run.state(trained, optimizer, controllers, memory=memory)
    policy, value = trained["policy"], trained.get("value")
    head = value.head if value is not None and section.value == "shared" else None

    asked = prompts(run, B)
    read = prompts(run, B, marker) if marker else asked
    evaluations = section.steps // section.eval_every_steps if section.eval_every_steps else 0
    rollouts = section.steps + evaluations * -(-run.config.data.held_out_prompts // B)
    phases = [sampling_phase(run, "rollout", network, policy, read, sampling, rollouts, head)]
    batch = sampled(run, network, policy, asked, sampling, head, read if marker else None)
    tokens = _tokens(batch)
    if value is not None and head is None:
        values = rollout.make_values(network)
        phases.append(Phase("values", values, (base, value, batch), rollouts, tokens))
        batch = batch.replace(old_values=run.rows(*batch.completion_ids.shape, dtype=jnp.float32))
    scorer, scalar = rollout.make_scorer(network, run.eos_ids), state.controllers["reward_mean"]
    if reward is not None:
        arguments = (base, reward, batch, scalar, state.controllers["reward_std"])
        phases.append(Phase("reward scoring", scorer, arguments, rollouts, tokens))
    if algorithm.greedy_baseline:
        first = dataclasses.replace(sampling, temperature=0.0, num_completions=1)
        phases.append(sampling_phase(run, "greedy rollout", network, policy, asked, first, rollouts))
        greedy = sampled(run, network, policy, asked, first)
        if reward is not None:
            arguments = (base, reward, greedy, scalar, state.controllers["reward_std"])
            phases.append(Phase("greedy reward scoring", scorer, arguments, rollouts, _tokens(greedy)))
        batch = batch.replace(greedy=greedy.replace(scores=run.rows(B, 1, dtype=jnp.float32)))
    batch = batch.replace(scores=run.rows(*batch.weights.shape, dtype=jnp.float32))
    frozen = {"base": base} | ({"policy": policy} if settings.reads_policy else {})
    prepare = rollout.make_prepare(algorithm, settings, network)
    arguments = (frozen, state.controllers, batch)
    what = "reference scoring, targets" if settings.reads_reference else "targets"
    phases.append(Phase(what, prepare, arguments, rollouts, tokens))
    taught = run.as_batch(jax.eval_shape(prepare, *arguments)[0])
    earlier = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), taught)
    select = online.selector(algorithm, settings, run.mesh)
    if select is not None:
        arguments = (state.memory, taught, run.key)
        phases.append(Phase("selection", select, arguments, section.steps))
        memory, taught = jax.eval_shape(select, *arguments)
        state, taught = state.replace(memory=run.everywhere(memory)), run.as_batch(taught)
    rows = None
    if auxiliary is not None:
        count, size = section.rollout_epochs * section.num_minibatches, section.ptx_batch_size
        rows = _examples(run, count, size, R + 1)
    arguments = (state, {"base": base}, taught, rows)
    learned_tokens = section.rollout_epochs * _tokens(taught)
    # Of TRPO's two searches, each with an end of its own.
    turns = max(getattr(settings, "cg_iterations", 1), getattr(settings, "backtrack_steps", 0) + 1)
    phases.append(Phase("update", update, arguments, section.steps, learned_tokens, trips=turns))
    if learned and reward is not None:
        batches = section.reward_reference_batches
        phases.append(sampling_phase(run, "reference rollout", network, Role(), asked, sampling, batches))
    # The batch of the step before is kept until its samples are read.
    return Stage(name, section.steps, tuple(phases), (base, reward, state, earlier), unplanned)


def _examples(run, count: int, B: int, R: int) -> GroupedBatch:
    """[updates, B, ...], as online.example_stream makes them."""
    prompt, completion = (count, B, run.prompt_length), (count, B, 1, R)
    return GroupedBatch(
        run.rows(*prompt, axis=1),
        run.rows(*prompt, axis=1),
        run.rows(*completion, axis=1),
        run.rows(*completion, axis=1),
        weights=run.rows(count, B, 1, dtype=jnp.float32, axis=1),
    )


def unplanned_rewards(run, reward) -> tuple[str, ...]:
    components = run.config.rewards.components
    named = [repr(one) for one in components if one != LEARNED]
    said = (f"the rewards {', '.join(named)}, which read text",) if named else ()
    if LEARNED in components and reward is None and "reward_model" in run.config:
        said += ("the learned reward, which has a tokenizer of its own and reads text",)
    return said


def constitution(run: PlannedRun) -> Stage:
    section = run.config.constitution
    network, sampling, B = run.network(), run.sampling(1), section.batch_size
    calls = -(-section.num_prompts // B)
    phase = sampling_phase(run, "answers", network, Role(), prompts(run, B), sampling, calls)
    why = (
        "criticisms and rewritings: how long their questions are, only the principles and the tokenizer know"
    )
    return Stage("constitution", calls, (phase,), (run.raw_base,), (why,))


STAGES = {
    "constitution": constitution,
    "sft": sft,
    "preferences": make_preferences,
    "reward_model": reward_model,
}
STAGES |= {name: functools.partial(on_preferences, name=name) for name in preference.ROWS}
STAGES |= {name: functools.partial(on_samples, name=name) for name, row in ALGORITHMS.items() if row.online}
