"""The table of algorithms: how a batch gets its targets, the objective inside the gradient, the roles it trains.

An algorithm is a pure loss from losses/ plus the few lines here that feed it. Knows no config object, file or clock."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.losses import kl
from rlhf_jax.losses.advantages import gae, shaped_rewards
from rlhf_jax.losses.logprobs import fused_token_logprobs
from rlhf_jax.losses.masking import masked_mean, masked_whiten
from rlhf_jax.losses.ppo import clipped_policy_loss, clipped_value_loss
from rlhf_jax.losses.reward_model import pairwise_logexp, pairwise_logsigmoid
from rlhf_jax.losses.supervised import completion_cross_entropy
from rlhf_jax.models import heads, roles
from rlhf_jax.models.llama import Llama, unembedding


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One row of the table. `network` below is a Network, `settings` the row's own dataclass."""

    settings: type
    # (settings, network, trained, frozen, controllers, batch, rng) -> loss, (weight, metrics)
    objective: Callable
    # (settings, network, frozen, controllers, batch) -> batch, metrics; online only
    prepare: Callable | None = None
    # (settings, controllers, metrics, num_sequences) -> controllers
    control: Callable | None = None
    trains: tuple[str, ...] = ("policy",)


@dataclasses.dataclass(frozen=True)
class Network:
    """The decoder and how its vocabulary is read."""

    model: Llama
    vocab_chunk: int = 8192  # vocabulary entries at a time; 0: all at once
    temperature: float = 1.0  # of the sampler: log-probabilities are scored at it

    def logprobs(self, base: dict, role: roles.Role, batch):
        """(logprobs, entropy, states) of the completion tokens: [B, G, R] nats, [B, G, R] nats, [B, G, R, D]."""
        states = roles.predicting_states(self.model, base, role, batch)
        logprobs, entropy = fused_token_logprobs(
            states,
            unembedding(role.params(base)),
            batch.completion_ids,
            chunk_size=self.vocab_chunk,
            temperature=self.temperature,
        )
        return logprobs, entropy, states


@dataclasses.dataclass(frozen=True)
class SFTSettings:
    pass


def sft_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, entropy, _ = network.logprobs(frozen["base"], trained["policy"], batch)
    mask = _token_mask(batch)
    loss = completion_cross_entropy(_rows(logprobs), mask)
    return loss, (mask.sum(), {"entropy": masked_mean(_rows(entropy), mask)})


@dataclasses.dataclass(frozen=True)
class RewardModelSettings:
    loss: str = "logsigmoid"  # or logexp
    center_coeff: float = 0.0  # pulls the mean of chosen and rejected to 0


def reward_model_objective(settings, network, trained, frozen, controllers, batch, rng):
    """Pairwise: completion 0 of each group was chosen, 1 rejected."""
    scores = roles.scores(network.model, frozen["base"], trained["reward"], batch)
    chosen, rejected = scores[:, 0], scores[:, 1]
    if settings.loss == "logexp":
        losses = pairwise_logexp(chosen, rejected)
    else:
        losses = pairwise_logsigmoid(chosen, rejected, center_coeff=settings.center_coeff)
    pairs = batch.weights.min(axis=1)
    metrics = {
        "accuracy": chosen > rejected,  # a tie counts as wrong
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
    metrics = {name: masked_mean(x.astype(jnp.float32), pairs) for name, x in metrics.items()}
    return masked_mean(losses, pairs), (pairs.sum(), metrics)


@dataclasses.dataclass(frozen=True)
class PPOSettings:
    """Units: kl_* in nats of a whole completion, coefficients in reward units a nat."""

    kl_coeff: float = 0.05  # where it starts, if adaptive; 0: the reference is never run
    kl_kind: str = "k1"
    kl_target: float = 0.0  # adaptive controller's target in nats a sequence; 0: the coefficient is fixed
    kl_horizon: float = 10000.0  # sequences
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_epsilon: float = 0.2
    dual_clip: float = 0.0  # cap on the ratio where the advantage is negative; 0: none
    value_clip: float = 0.2
    value_coeff: float = 0.1
    entropy_coeff: float = 0.0
    whiten_rewards: bool = False  # without shifting the mean
    whiten_advantages: bool = True
    reward_clip: float = 0.0  # scores clipped to +-this, 0: none
    missing_eos_rule: str = "none"  # a completion without an end token: none, penalty (subtracted), replace
    missing_eos_value: float = 0.0


def ppo_prepare(settings, network, frozen, controllers, batch):
    """Scores, KL to the reference, shaped rewards, advantages and returns of one rollout, over the whole batch."""
    mask, finished = _token_mask(batch), _finished(batch)
    scores = _missing_eos(settings, batch.scores.reshape(-1), finished)
    if settings.reward_clip:
        scores = jnp.clip(scores, -settings.reward_clip, settings.reward_clip)
    old = _rows(batch.old_logprobs)
    metrics = _score_metrics(batch, finished, mask)
    reference = old
    if settings.kl_coeff:
        reference, _, _ = network.logprobs(frozen["base"], roles.Role(), batch)
        batch = batch.replace(ref_logprobs=reference)
        reference = _rows(reference)
        metrics["kl"] = _sequence_mean(kl.kl_estimate(old, reference, kind=settings.kl_kind), mask, batch)
        metrics["kl_coeff"] = controllers["kl_coeff"]
    rewards = shaped_rewards(scores, old, reference, mask, controllers["kl_coeff"], kind=settings.kl_kind)
    if settings.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, _rows(batch.old_values), mask, settings.gamma, settings.gae_lambda)
    if settings.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    like = lambda x: x.reshape(batch.completion_mask.shape)
    return batch.replace(advantages=like(advantages), returns=like(returns)), metrics


def ppo_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, entropy, states = network.logprobs(frozen["base"], trained["policy"], batch)
    if not trained["value"].is_head_only:
        states = roles.predicting_states(network.model, frozen["base"], trained["value"], batch)
    values = heads.apply(trained["value"].head, states)
    mask = _token_mask(batch)
    policy_loss, metrics = clipped_policy_loss(
        _rows(logprobs),
        _rows(batch.old_logprobs),
        _rows(batch.advantages),
        mask,
        settings.clip_epsilon,
        dual_clip=settings.dual_clip or None,
    )
    value_loss, value_metrics = clipped_value_loss(
        _rows(values), _rows(batch.old_values), _rows(batch.returns), mask, settings.value_clip
    )
    mean_entropy = masked_mean(_rows(entropy), mask)
    loss = policy_loss + settings.value_coeff * value_loss - settings.entropy_coeff * mean_entropy
    metrics = metrics | value_metrics | {"policy_loss": policy_loss, "entropy": mean_entropy}
    metrics["value_loss"] = value_loss
    # Before the first update the policy is the one that sampled: this is 0 but for rounding, or something is wrong.
    metrics["first_ratio_gap"] = metrics.pop("ratio_max_gap")
    return loss, (mask.sum(), metrics)


def ppo_control(settings, controllers, metrics, num_sequences):
    if not settings.kl_target or not settings.kl_coeff:
        return controllers
    new = kl.adaptive_kl_update(
        controllers["kl_coeff"],
        metrics["kl"],
        target=settings.kl_target,
        horizon=settings.kl_horizon,
        batch_size=num_sequences,
    )
    return controllers | {"kl_coeff": new}


ALGORITHMS = {
    "sft": Algorithm(SFTSettings, sft_objective),
    "reward_model": Algorithm(RewardModelSettings, reward_model_objective, trains=("reward",)),
    "ppo": Algorithm(PPOSettings, ppo_objective, ppo_prepare, ppo_control, trains=("policy", "value")),
}


def _rows(x):
    """[B, G, R] -> [B*G, R]: losses know sequences, not groups."""
    return x.reshape(-1, x.shape[-1])


def _token_mask(batch):
    return _rows(batch.completion_mask * batch.weights[..., None]).astype(jnp.float32)


def _finished(batch):
    return batch.finished.reshape(-1)


def _sequence_mean(per_token, mask, batch):
    return masked_mean(jnp.where(mask > 0, per_token, 0.0).sum(-1), batch.weights.reshape(-1))


def _missing_eos(settings, scores, finished):
    if settings.missing_eos_rule == "replace":
        return jnp.where(finished, scores, settings.missing_eos_value)
    if settings.missing_eos_rule == "penalty":
        return jnp.where(finished, scores, scores - settings.missing_eos_value)
    return scores


def _score_metrics(batch, finished, mask):
    weights, scores = batch.weights.reshape(-1), batch.scores.reshape(-1)
    mean = masked_mean(scores, weights)
    return {
        "reward": mean,
        "reward_std": jnp.sqrt(masked_mean(jnp.square(scores - mean), weights)),
        "completion_length": masked_mean(mask.sum(-1), weights),
        "finished_fraction": masked_mean(finished.astype(jnp.float32), weights),
        "tokens": jax.lax.stop_gradient(mask.sum()),
    }
