"""Programs of the stages `gate` and `evaluation`, for plans; those of training are in rlhf_jax/training/phases.py."""

import jax.numpy as jnp

from experiments import gate
from experiments.judging import judged_stage
from rlhf_jax.evaluation import side_by_side
from rlhf_jax.models.roles import Role
from rlhf_jax.sampling.beam import BeamConfig, beam_search
from rlhf_jax.training import phases
from rlhf_jax.training.phases import Phase, Stage
from rlhf_jax.training.scoring import LEARNED
from rlhf_jax.types import GroupedBatch


def of_gate(run) -> Stage:
    section, reward = run.config.gate, phases.reward_role(run)
    if LEARNED not in run.config.rewards.components:
        return Stage("gate", 0)
    B, R = gate.rows_of(run, section.batch_size), run.config.data.completion_tokens
    pairs = min(section.max_pairs, run.config.data.held_out_pairs)
    found, asked = [], min(section.preview_prompts, run.config.data.held_out_prompts)
    if reward is not None:
        arguments = (run.raw_base, reward, phases.group(run, B, 2, R + 1))
        calls = 2 * -(-pairs // B)
        found.append(Phase("scoring pairs", gate.make_forward(run), arguments, calls, B * 2 * R))
    if asked:
        size, sampling = (
            gate.rows_of(run, min(section.batch_size, asked)),
            run.sampling(section.preview_completions),
        )
        asked_of, calls = phases.prompts(run, size), -(-asked // size)
        found.append(phases.sampling_phase(run, "preview", run.network(), Role(), asked_of, sampling, calls))
        if reward is not None:
            batch = phases.sampled(run, run.network(), Role(), asked_of, sampling)
            made = batch.completion_ids.size
            arguments = (run.raw_base, reward, batch)
            found.append(Phase("scoring previews", gate.make_forward(run), arguments, calls, made))
    return Stage("gate", 1, tuple(found), (run.raw_base, reward), phases.unplanned_rewards(run, reward))


def of_evaluation(run) -> Stage:
    section, config = run.config.evaluation, run.config
    name, reward = judged_stage(run), phases.reward_role(run)
    policy = Role()
    if name:
        policy = run.roles(lambda: {"policy": run.new_role(run.rng(name), config[name].train, run.base)})[
            "policy"
        ]
    B, sampling = section.batch_size, run.decoding()
    batches, asked = -(-config.data.held_out_prompts // B), phases.prompts(run, B)
    beams, model, R = isinstance(sampling, BeamConfig), run.model, config.data.completion_tokens
    G = sampling.num_return if beams else sampling.num_completions
    found = []
    for side, role, against, rounds in (
        ("untuned", Role(), None, 1),
        ("tuned", policy, Role(), section.best_of),
    ):
        calls = rounds * batches
        if beams:
            arguments = (model, role.params(run.raw_base), *asked, sampling, role.adapter)
            made = Phase(f"{side}: beams", beam_search, arguments, calls, B * G * R, max(R - 1, 1), True)
            found.append(made)
        else:
            found.append(phases.sampling_phase(run, side, run.network(), role, asked, sampling, calls))
        batch = GroupedBatch(*asked, run.rows(B, G, R), run.rows(B, G, R))
        batch = batch.replace(old_logprobs=run.rows(B, G, R, dtype=jnp.float32))
        measure = side_by_side.make_measure(model, sampling, (0.0, 1.0), against, config.model.vocab_chunk)
        if reward is not None or against is not None:
            arguments = (run.raw_base, reward, batch)
            found.append(Phase(f"{side}: rewards, KL", measure, arguments, calls, B * G * R))
    unplanned = phases.unplanned_rewards(run, reward)
    return Stage("evaluation", 1, tuple(found), (run.raw_base, policy, reward), unplanned)


STAGES = {"gate": of_gate, "evaluation": of_evaluation}
