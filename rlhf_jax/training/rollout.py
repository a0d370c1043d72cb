"""Prompts -> completions -> rewards -> advantages: one GroupedBatch ready for the update.

Knows no loss. What runs on the device is dispatched without waiting; reading it is the caller's, one step later."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.models import heads, roles
from rlhf_jax.models.roles import Role
from rlhf_jax.parallel import hosts
from rlhf_jax.rewards import learned
from rlhf_jax.sampling.generate import generate
from rlhf_jax.training.algorithms import Network
from rlhf_jax.types import GroupedBatch


def sample(
    network: Network, base: dict, policy: Role, prompts, rng, sampling, head=None, asked=None
) -> GroupedBatch:
    """Completions of `prompts` (ids and mask [B, P], on the mesh) from a role, with their log-probabilities.

    asked: prompts that the role reads in the place of these, as (ids, mask); None: the same.
    """
    ids, mask = prompts
    read = prompts if asked is None else asked
    made = generate(network.model, policy.params(base), *read, rng, sampling, policy.adapter, head)
    return GroupedBatch(
        prompt_ids=ids,
        prompt_mask=mask,
        completion_ids=made.ids,
        completion_mask=made.mask,
        weights=jnp.ones(made.finished.shape, jnp.float32),
        finished=made.finished,
        old_logprobs=made.logprobs,
        old_values=made.values,
    )


def greedy(network: Network, base: dict, policy: Role, prompts, sampling) -> GroupedBatch:
    """The most likely completion of each prompt, by the token: one each, whatever `sampling` draws."""
    sampling = dataclasses.replace(sampling, temperature=0.0, num_completions=1)
    return sample(network, base, policy, prompts, jax.random.key(0), sampling)  # the key draws nothing


def make_scorer(network: Network, eos_ids: tuple[int, ...]):
    """Jitted (base, reward role, batch, mean, std) -> ([B, G] normalised learned reward, metrics: of an ensemble how
    much its members disagree)."""

    @jax.jit
    def scorer(base, role, batch, mean, std):
        scores, disagreement = learned.score_and_disagreement(
            network.model, base, role, batch, eos_ids, mean, std
        )
        if disagreement is None:
            return scores, {}
        return scores, {"reward_disagreement": masked_mean(disagreement, batch.weights)}

    return scorer


def make_values(network: Network):
    """Jitted (base, value role, batch) -> [B, G, R]: the head at the state that chose each token."""
    return jax.jit(
        lambda base, role, batch: heads.apply(
            role.head, roles.predicting_states(network.model, base, role, batch)
        )
    )


def make_prepare(algorithm, settings, network: Network):
    """Jitted (frozen, controllers, batch with scores) -> (batch with targets, metrics).

    A completion whose reward (or baseline) is not finite is taken out of every loss and statistic, and counted.
    """

    @jax.jit
    def prepare(frozen, controllers, batch):
        finite = jnp.isfinite(batch.scores)
        if batch.greedy is not None:
            known = jnp.isfinite(batch.greedy.scores)
            baseline = jnp.where(known, batch.greedy.scores, 0.0)
            batch, finite = batch.replace(greedy=batch.greedy.replace(scores=baseline)), finite & known
        lost = 1.0 - masked_mean(finite.astype(jnp.float32), batch.weights)
        batch = batch.replace(scores=jnp.where(finite, batch.scores, 0.0), weights=batch.weights * finite)
        batch, metrics = algorithm.prepare(settings, network, frozen, controllers, batch)
        return batch, metrics | {"invalid_reward_fraction": lost}

    return prepare


def texts(tokenizer, batch: GroupedBatch) -> list[list[str]]:
    """Decoded completions [B][G], without end tokens; each process decodes its share. Waits for the device."""
    ids, mask = hosts.gather((batch.completion_ids, batch.completion_mask))

    def decoded(rows):
        return [
            [
                tokenizer.decode_completion([i for i, kept in zip(*pair, strict=True) if kept])
                for pair in zip(*row, strict=True)
            ]
            for row in zip(ids[rows].tolist(), mask[rows].tolist(), strict=True)
        ]

    return hosts.spread(len(ids), decoded)


def sample_rows(
    prompts: list[str], completions: list[list[str]], batch: GroupedBatch, gold
) -> tuple[dict, list[dict]]:
    """(host metrics, one row a prompt: its first completion with reward, gold reward and KL)."""
    fields = {"reward": batch.scores}
    if batch.ref_logprobs is not None:
        log_ratio = batch.old_logprobs - batch.ref_logprobs
        fields["kl"] = jnp.where(batch.completion_mask > 0, log_ratio, 0.0).sum(-1)
    fields = hosts.gather(fields)
    metrics = {}
    if gold is not None:
        fields["gold_reward"] = scored_by(gold, prompts, completions)
        metrics["gold_reward"] = float(fields["gold_reward"].mean())
    rows = [
        {"prompt": prompt, "completion": completions[b][0]}
        | {name: float(x[b, 0]) for name, x in fields.items()}
        for b, prompt in enumerate(prompts)
    ]
    return metrics, rows


def scored_by(rule, prompts: list[str], completions: list[list[str]]) -> np.ndarray:
    """[B, G] of a rule on text; each process asks it about its share."""

    def of(rows):
        repeated = [prompt for prompt, row in zip(prompts[rows], completions[rows], strict=True) for _ in row]
        found = rule(repeated, [completion for row in completions[rows] for completion in row])
        return np.array(found, np.float64).reshape(-1, len(completions[0])).tolist()

    return np.array(hosts.spread(len(prompts), of))


def reward_statistics(network: Network, base, prompt_batches, rng, sampling, score) -> dict:
    """Mean and deviation of the raw reward over samples of the reference (the empty role).

    score: (number of the batch, batch) -> [B, G] raw rewards.
    """
    draw = functools.partial(sample, network, base, Role(), sampling=sampling)
    batches = [draw(prompts, jax.random.fold_in(rng, i)) for i, prompts in enumerate(prompt_batches)]
    scores = np.concatenate([hosts.gather(score(i, batch)).ravel() for i, batch in enumerate(batches)])
    return {"reward_mean": float(scores.mean()), "reward_std": float(max(scores.std(), 1e-6))}
