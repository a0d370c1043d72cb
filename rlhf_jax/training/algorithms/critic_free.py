"""Rows without a value role: REINFORCE, REINFORCE++, RLOO and the GRPO family. What differs is the baseline."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.losses import grpo
from rlhf_jax.losses.advantages import discounted_returns, group_relative, leave_one_out, rewards_less_kl
from rlhf_jax.losses.masking import masked_mean, masked_whiten
from rlhf_jax.losses.policy_gradient import policy_gradient_loss
from rlhf_jax.losses.ppo import clipped_policy_loss
from rlhf_jax.training.algorithms.row import Algorithm
from rlhf_jax.training.algorithms.shared import (
    OnlineSettings,
    control_kl,
    scored,
    sequences,
    token_mask,
)

BASELINE_DECAY = 0.9  # a step, of REINFORCE's running mean


@dataclasses.dataclass(frozen=True)
class ReinforceSettings(OnlineSettings):
    """Williams 1992: Monte Carlo returns of the reward with KL, less a baseline."""

    gamma: float = 1.0
    baseline: str = "running"  # mean return of the steps before; or none
    whiten_advantages: bool = False

    def check(self) -> str | None:
        if self.baseline not in ("running", "none"):
            return f"baseline is {self.baseline!r}; expected one of running, none."
        return super().check()


@dataclasses.dataclass(frozen=True)
class ReinforcePPSettings(OnlineSettings):
    """REINFORCE++, Hu et al. 2025, arXiv:2501.03262: returns whitened over the whole batch, PPO's clip."""

    gamma: float = 1.0
    clip_epsilon: float = 0.2


@dataclasses.dataclass(frozen=True)
class RLOOSettings(OnlineSettings):
    """Ahmadian et al. 2024, arXiv:2402.14740: one action a completion, KL in its reward, the others as baseline."""

    ratio_clip: float = 0.0  # half-width of the interval around a completion's ratio of 1; 0: none

    def check(self) -> str | None:
        return _no_exact_reward(self) or super().check()


@dataclasses.dataclass(frozen=True)
class GRPOSettings(OnlineSettings):
    """Shao et al. 2024, arXiv:2402.03300, and its relatives by loss_type (losses/grpo.py)."""

    loss_type: str = "grpo"
    advantage_scale: str = (
        "group"  # deviation that advantages are divided by: of the group, of the batch, or none
    )
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_loss_coeff: float = 0.04  # of the KL in the loss, nats a token; 0: none
    kl_loss_kind: str = (
        "k3"  # k1, k2, k3, k3+ (value of k3, gradient of k2), exact (over the whole vocabulary)
    )

    @property
    def kl_coefficients(self) -> dict[str, float]:
        return super().kl_coefficients | {"kl_loss_coeff": self.kl_loss_coeff}

    @property
    def keeps_reference_states(self) -> bool:
        return bool(self.kl_loss_coeff) and self.kl_loss_kind == "exact"

    def check(self) -> str | None:
        for name, value, known in (
            ("loss_type", self.loss_type, grpo.LOSSES),
            ("kl_loss_kind", self.kl_loss_kind, (*grpo.KL_KINDS, "exact")),
            ("advantage_scale", self.advantage_scale, ("group", "batch", "none")),
        ):
            if value not in known:
                return f"{name} is {value!r}; expected one of {', '.join(known)}."
        return _no_exact_reward(self) or super().check()


def _no_exact_reward(settings):
    """One advantage a completion has no place for each token's own share of the exact KL (shared._penalty)."""
    if settings.kl_coeff and settings.kl_kind == "exact":
        return (
            "kl_kind is 'exact', which needs an advantage for each token; expected k1, k2 or k3 (or, with grpo, "
            "kl_coeff 0 and kl_loss_kind exact)."
        )
    return None


def reinforce_prepare(settings, network, frozen, controllers, batch):
    """Returns-to-go less the running baseline, which knows nothing of this batch."""
    batch, returns, mask, metrics = _returns(settings, network, frozen, controllers, batch)
    metrics["return"] = masked_mean(returns[:, 0], batch.weights.reshape(-1))
    advantages = returns
    if settings.baseline == "running":
        advantages = jnp.where(mask > 0, returns - controllers["baseline"], 0.0)
        metrics["baseline"] = controllers["baseline"]
    if settings.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    return _with_advantages(batch, advantages), metrics


def reinforce_control(settings, controllers, metrics, num_sequences):
    controllers = control_kl(settings, controllers, metrics, num_sequences)
    mean = BASELINE_DECAY * controllers["baseline"] + (1 - BASELINE_DECAY) * metrics["return"]
    return controllers | {"baseline": mean}


def reinforce_pp_prepare(settings, network, frozen, controllers, batch):
    batch, returns, mask, metrics = _returns(settings, network, frozen, controllers, batch)
    return _with_advantages(batch, masked_whiten(returns, mask)), metrics


def rloo_prepare(settings, network, frozen, controllers, batch):
    batch, rewards, metrics = _group_rewards(settings, network, frozen, controllers, batch)
    return _with_advantages(batch, leave_one_out(rewards, batch.weights)), metrics


def grpo_prepare(settings, network, frozen, controllers, batch):
    batch, rewards, metrics = _group_rewards(settings, network, frozen, controllers, batch)
    advantages = group_relative(rewards, settings.advantage_scale, weights=batch.weights)
    return _with_advantages(batch, advantages), metrics


def reinforce_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, old, mask, entropy = _policy(network, trained, frozen, batch)
    loss, metrics = policy_gradient_loss(logprobs, old, sequences(batch.advantages), mask)
    return _finished(settings, loss, metrics, entropy, mask)


def reinforce_pp_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, old, mask, entropy = _policy(network, trained, frozen, batch)
    advantages = sequences(batch.advantages)
    loss, metrics = clipped_policy_loss(logprobs, old, advantages, mask, settings.clip_epsilon)
    return _finished(settings, loss, metrics, entropy, mask)


def rloo_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, old, mask, entropy = _policy(network, trained, frozen, batch)
    advantages = batch.advantages[..., 0].reshape(-1)
    clip = settings.ratio_clip or None
    loss, metrics = policy_gradient_loss(logprobs, old, advantages, mask, "sequence", clip)
    return _finished(settings, loss, metrics, entropy, mask, (mask > 0).any(-1).sum())


def grpo_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, old, mask, entropy, states = _policy_and_states(network, trained, frozen, batch)
    reference = sequences(batch.ref_logprobs) if settings.kl_loss_coeff else None
    controlled = settings.kl_loss_coeff and settings.kl_control != "fixed"
    beta = controllers["kl_loss_coeff"] if controlled else settings.kl_loss_coeff
    exact = None
    if settings.keeps_reference_states:
        exact = sequences(network.full_kl(frozen["base"], trained["policy"], states, batch.ref_states))
    loss, metrics = grpo.grpo_loss(
        logprobs,
        old,
        reference,
        batch.advantages[..., 0].reshape(-1),
        mask,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        beta=beta,
        kl_kind=settings.kl_loss_kind,
        token_kl=exact,
        loss_type=settings.loss_type,
        max_length=mask.shape[-1],
    )
    # `kl` is the rollout's, before any update.
    if reference is not None:
        metrics["kl_loss_nats_per_completion"] = metrics.pop("kl")
        metrics["kl_loss_coeff"] = jnp.asarray(beta, jnp.float32)
    gap = jax.lax.stop_gradient(jnp.where(mask > 0, logprobs - old, 0.0))
    metrics["ratio_max_gap"] = jnp.abs(jnp.expm1(gap)).max()
    by_token = settings.loss_type in ("bnpo", "dapo", "cispo")
    return _finished(settings, loss, metrics, entropy, mask, None if by_token else mask.shape[0])


def _returns(settings, network, frozen, controllers, batch):
    """(batch, returns-to-go [N, R] of scores less KL, mask, metrics)."""
    batch, scores, penalty, metrics = scored(settings, network, frozen, controllers, batch)
    mask = token_mask(batch)
    rewards = rewards_less_kl(scores, penalty.charged, mask, controllers["kl_coeff"])
    returns = discounted_returns(rewards, mask, settings.gamma)
    if penalty.own is not None:
        returns = returns - controllers["kl_coeff"] * penalty.own
    return batch, returns, mask, metrics


def _group_rewards(settings, network, frozen, controllers, batch):
    """(batch, scores less KL of the whole completion [B, G], metrics)."""
    batch, scores, penalty, metrics = scored(settings, network, frozen, controllers, batch)
    rewards = scores.reshape(batch.weights.shape)
    counts = batch.weights > 0
    highest = jnp.where(counts, rewards, -jnp.inf).max(1)
    lowest = jnp.where(counts, rewards, jnp.inf).min(1)
    metrics["zero_variance_fraction"] = masked_mean((highest <= lowest).astype(jnp.float32), counts.any(1))
    if settings.kl_coeff:
        rewards = rewards - controllers["kl_coeff"] * penalty.charged.sum(-1).reshape(rewards.shape)
    return batch, rewards, metrics


def _policy(network, trained, frozen, batch):
    return _policy_and_states(network, trained, frozen, batch)[:-1]


def _policy_and_states(network, trained, frozen, batch):
    logprobs, entropy, states = network.logprobs(frozen["base"], trained["policy"], batch)
    return sequences(logprobs), sequences(batch.old_logprobs), token_mask(batch), sequences(entropy), states


def _finished(settings, loss, metrics, entropy, mask, num_sequences=None):
    """(loss with the entropy bonus, (weight, metrics)). num_sequences: that the loss is a mean over; None: tokens."""
    if num_sequences is None:
        weight, mean_entropy = mask.sum(), masked_mean(entropy, mask)
    else:
        weight = num_sequences
        mean_entropy = masked_mean(entropy, mask, axis=-1).sum() / jnp.maximum(weight, 1)
    metrics = metrics | {"policy_loss": loss, "entropy": mean_entropy}
    # Before the first update the policy is the one that sampled: this is 0 but for rounding, or something is wrong.
    metrics["first_ratio_gap"] = metrics.pop("ratio_max_gap")
    return loss - settings.entropy_coeff * mean_entropy, (weight, metrics)


def _with_advantages(batch, advantages):
    """advantages: [N, R], or [B, G], the same at every token."""
    shape = batch.completion_mask.shape
    if advantages.shape == shape[:2]:
        advantages = jnp.broadcast_to(advantages[..., None], shape)
    return batch.replace(advantages=advantages.reshape(shape))


ROWS = {
    "reinforce": Algorithm(
        ReinforceSettings,
        reinforce_objective,
        reinforce_prepare,
        reinforce_control,
        controllers=("baseline",),
    ),
    "reinforce_pp": Algorithm(ReinforcePPSettings, reinforce_pp_objective, reinforce_pp_prepare, control_kl),
    "rloo": Algorithm(RLOOSettings, rloo_objective, rloo_prepare, control_kl),
    "grpo": Algorithm(GRPOSettings, grpo_objective, grpo_prepare, control_kl),
}
