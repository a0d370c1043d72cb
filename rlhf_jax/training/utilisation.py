"""Model FLOPs utilisation: the arithmetic that a step cannot do without, over what the devices could do in its time.

The count is of models/arithmetic.py, pass by pass of each kind of step; a step that has passes not known here has none,
so `mfu` is absent there rather than wrong. Knows no loss."""

from collections.abc import Callable

import numpy as np

from rlhf_jax.models.arithmetic import Tokens, forward, training_passes
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts, peak
from rlhf_jax.training.algorithms.gating import GATING
from rlhf_jax.training.algorithms.preference import DPOSettings, KTOSettings, ReferenceSettings
from rlhf_jax.training.workdir import note_timing


def peak_of(run, count: Callable | None) -> float:
    """FLOP/s that the devices of a run reach, left in timing.json with where it is from. 0 without a count: nothing is
    measured."""
    if count is None:
        return 0.0
    found = peak.of_devices(run.mesh.devices.flat, run.model.config.dtype)
    note_timing(run.workdir, peak_flops=found.flops, peak_flops_source=found.source)
    return found.flops


def told(parts, flops: float | None, peak_flops: float) -> dict[str, float]:
    """Metrics of a step one step late. flops: None: not known. Time of evaluation is not in `mfu`, idle time is."""
    metrics = parts.seconds()
    spent = sum(seconds for name, seconds in metrics.items() if name != "time/evaluate")
    if flops is not None and spent > 0:
        metrics["mfu"] = flops / (spent * peak_flops)
    return metrics


def of_masks(masks) -> Tokens:
    """masks: of prompts [B, P] and completions [B, G, R], on this host."""
    prompts, completions = (np.asarray(mask).sum(-1).tolist() for mask in masks)
    return Tokens.of_groups(prompts, completions)


# Training on the policy's own samples


def online_counter(config, section, algorithm, settings, trained: dict, rewards, reward) -> Callable | None:
    """(masks of each sampled batch, those of the rollout, of what is trained on, updates made) -> FLOPs of a step.

    Args:
      config: LlamaConfig. trained: the roles. rewards: scoring.Rewards. reward: the learned reward, or None.
    Returns: None where not every pass is known: of rows with an optimizer or examples of their own (TRPO, PPO-ptx) or a
      pool of old samples (Quark), with exact KL, or rewarded by a network that is no decoder of the run.
    """
    own_passes = algorithm.optimizer or algorithm.memory or algorithm.auxiliary_objective
    exact = settings.charges_exact_kl or settings.keeps_reference_states
    others = rewards.by_model or (rewards.learned and not isinstance(reward, Role))
    if own_passes or exact or others:
        return None
    policy, value = trained["policy"], trained.get("value")
    policy_passes, value_passes, value_depth = training_passes(policy.base is not None), 0, None
    depths = [role.depth for role in reward.members or (reward,)] if rewards.learned else []
    if value is not None and not value.is_head_only:
        value_passes, value_depth = training_passes(value.base is not None), value.depth
        depths.append(value_depth)  # the values of what was sampled
    updates = section.rollout_epochs * section.num_minibatches

    def count(sampled, rollout, taught, made=None) -> float:
        total = 0.0
        for tokens in map(of_masks, sampled):
            total += forward(config, tokens).times(1, 1, 1)
            total += sum(forward(config, tokens, depth).times(1, 0, 1) for depth in depths)
        passes = settings.reads_reference + settings.reads_policy
        total += passes * forward(config, of_masks(rollout)).times(1, 1, 1)
        tokens = of_masks(taught)
        update = forward(config, tokens).times(policy_passes)
        if value_passes:
            update += forward(config, tokens, value_depth).times(value_passes, 0)
        return total + update * section.rollout_epochs * (1.0 if made is None else made / updates)

    return count


def online_flops(count: Callable | None, parts, rollout, taught, metrics: dict) -> float | None:
    """Of a step whose `parts` are on a Clock. rollout, taught: batches, whole and as trained on. Waits for the device,
    and of several processes for the others."""
    if count is None:
        return None
    masks = lambda batch: (batch.prompt_mask, batch.completion_mask)
    made = metrics.get("updates")
    given = hosts.gather((parts.outputs["rollout"], masks(rollout), masks(taught)))
    return count(*given, None if made is None else float(made))


# Training on fixed groups


def offline_counter(config, algorithm, settings, trained: dict) -> Callable | None:
    """(batch on the host) -> FLOPs of a step on a GroupedBatch, packed or not.

    None where not every pass is known: of KTO (which reads each prompt with another's completion too), weighted DPO,
    and the gate of a reward model, which trains no decoder.
    """
    (role,) = (trained[name] for name in algorithm.trains)
    weighted = isinstance(settings, DPOSettings) and settings.wpo
    if algorithm is GATING or isinstance(settings, KTOSettings) or weighted:
        return None
    reads_reference = isinstance(settings, ReferenceSettings) and settings.reference == "base"
    passes, depth = training_passes(role.base is not None), role.depth
    head_passes = passes if role.head is None else 0  # with a head of its own it reads no vocabulary

    def count(batch) -> float:
        one = forward(config, tokens_of(batch), depth)
        update = one.times(passes, head_passes)
        return update + reads_reference * one.times(1, 1, 1)

    return count


def tokens_of(batch) -> Tokens:
    if batch.segments is None:
        return of_masks((batch.prompt_mask, batch.completion_mask))
    rows = batch.segments.reshape(-1, batch.segments.shape[-1])
    lengths = [length for row in rows for length in np.bincount(row)[1:].tolist()]
    return Tokens.of_texts(lengths, int(batch.completion_mask.sum()))
