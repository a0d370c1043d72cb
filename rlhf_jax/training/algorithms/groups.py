"""RLOO and the GRPO family: a completion is worth what it is better than the others of its group."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.losses import grpo
from rlhf_jax.losses.advantages import group_relative, high_entropy, leave_one_out, varied
from rlhf_jax.losses.masking import masked_mean, masked_whiten
from rlhf_jax.losses.policy_gradient import policy_gradient_loss
from rlhf_jax.training.algorithms.critic_free import finished, policy, policy_and_states, with_advantages
from rlhf_jax.training.algorithms.row import Algorithm
from rlhf_jax.training.algorithms.shared import (
    CompletionSettings,
    control_kl,
    ruled_scores,
    scored,
    sequences,
    token_mask,
)

TOKEN_MEANS = ("bnpo", "dapo", "cispo")  # loss types that are means over tokens
SEQUENCE_RATIOS = ("gspo", "luspo")  # whose gradient goes to every token of a completion alike


@dataclasses.dataclass(frozen=True)
class GroupSettings(CompletionSettings):
    """What DAPO (Yu et al. 2025, arXiv:2503.14476) adds to any row of groups."""

    # Completions without an end token are in no loss and in none of its counts; in baseline and deviation of their
    # group they stay, as in TRL: their score says something about the others.
    mask_truncated: bool = False
    # Rollouts of other prompts that a step may draw in the place of groups whose rewards, before KL, are all equal.
    # Groups that stay equal count as they do without refills.
    max_refills: int = 0


@dataclasses.dataclass(frozen=True)
class RLOOSettings(GroupSettings):
    """Ahmadian et al. 2024, arXiv:2402.14740: one action a completion, KL in its reward, the others as baseline."""

    ratio_clip: float = 0.0  # half-width of the interval around a completion's ratio of 1; 0: none
    whiten_advantages: bool = False  # over the batch


@dataclasses.dataclass(frozen=True)
class GRPOSettings(GroupSettings):
    """Shao et al. 2024, arXiv:2402.03300, and its relatives by loss_type (losses/grpo.py)."""

    loss_type: str = "grpo"
    advantage_scale: str = (
        "group"  # deviation that advantages are divided by: of the group, of the batch, or none
    )
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_loss_coeff: float = 0.04  # of the KL in the loss, nats a token; 0: none
    # k1, k2, k3, k3+ (value of k3, gradient of k2), exact (over the whole vocabulary)
    kl_loss_kind: str = "k3"
    baseline: str = "mean"  # of the group's rewards; or length_weighted
    # Wang et al. 2025, arXiv:2506.01939: advantages reach this fraction of the rollout's tokens alone, those where the
    # policy that sampled was least certain. As there, means stay over all tokens, and KL and entropy are of all.
    top_entropy_quantile: float = 1.0

    @property
    def kl_coefficients(self) -> dict[str, float]:
        return super().kl_coefficients | {"kl_loss_coeff": self.kl_loss_coeff}

    @property
    def keeps_reference_states(self) -> bool:
        return bool(self.kl_loss_coeff) and self.kl_loss_kind == "exact"

    @property
    def reads_policy(self) -> bool:
        return super().reads_policy or self.top_entropy_quantile < 1

    def check(self) -> str | None:
        for name, value, known in (
            ("loss_type", self.loss_type, grpo.LOSSES),
            ("kl_loss_kind", self.kl_loss_kind, (*grpo.KL_KINDS, "exact")),
            ("advantage_scale", self.advantage_scale, ("group", "batch", "none")),
            ("baseline", self.baseline, ("mean", "length_weighted")),
        ):
            if value not in known:
                return f"{name} is {value!r}; expected one of {', '.join(known)}."
        if not 0 < self.top_entropy_quantile <= 1:
            return f"top_entropy_quantile is {self.top_entropy_quantile}; expected above 0, at most 1 (all tokens)."
        if self.top_entropy_quantile < 1 and self.loss_type in SEQUENCE_RATIOS:
            return (
                f"top_entropy_quantile is {self.top_entropy_quantile}, but the ratio of loss_type {self.loss_type!r} "
                "has no tokens to choose from; expected 1, or another loss_type."
            )
        return super().check()


def rloo_prepare(settings, network, frozen, controllers, batch):
    batch, rewards, metrics = _group_rewards(settings, network, frozen, controllers, batch)
    advantages = leave_one_out(rewards, batch.weights)
    if settings.whiten_advantages:
        advantages = masked_whiten(advantages, batch.weights)
    return _trained_on(settings, with_advantages(batch, advantages)), metrics


def grpo_prepare(settings, network, frozen, controllers, batch):
    batch, rewards, metrics = _group_rewards(settings, network, frozen, controllers, batch)
    lengths = batch.completion_mask.sum(-1) if settings.baseline == "length_weighted" else None
    advantages = group_relative(rewards, settings.advantage_scale, weights=batch.weights, lengths=lengths)
    batch = _trained_on(settings, with_advantages(batch, advantages))
    if settings.top_entropy_quantile < 1:
        _, entropies, _ = network.logprobs(frozen["base"], frozen["policy"], batch)
        mask = token_mask(batch)
        chosen = high_entropy(sequences(entropies), mask, settings.top_entropy_quantile)
        batch = with_advantages(batch, jnp.where(chosen, sequences(batch.advantages), 0.0))
        metrics["entropy_chosen"] = masked_mean(sequences(entropies), chosen)
    return batch, metrics


def teaches(settings, batch):
    """[B] bool: whether the rewards of a group, before KL, differ. Those that are not finite say nothing."""
    finite = jnp.isfinite(batch.scores)
    return varied(ruled_scores(settings, batch), batch.weights * finite)


def rloo_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, old, mask, entropy = policy(network, trained, frozen, batch)
    advantages = batch.advantages[..., 0].reshape(-1)
    clip = settings.ratio_clip or None
    loss, metrics = policy_gradient_loss(logprobs, old, advantages, mask, "sequence", clip)
    return finished(settings, loss, metrics, entropy, mask, (mask > 0).any(-1).sum())


def grpo_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, old, mask, entropy, states = policy_and_states(network, trained, frozen, batch)
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
        sequences(batch.advantages),
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
    count = None if settings.loss_type in TOKEN_MEANS else mask.shape[0]
    if settings.mask_truncated and count is not None:
        # What was cut off is no sequence of loss 0: it is not there.
        count = (mask > 0).any(-1).sum()
        loss = loss * mask.shape[0] / jnp.maximum(count, 1)
    return finished(settings, loss, metrics, entropy, mask, count)


def _group_rewards(settings, network, frozen, controllers, batch):
    """(batch, scores less KL of the whole completion [B, G], metrics)."""
    batch, scores, penalty, metrics = scored(settings, network, frozen, controllers, batch)
    rewards = scores.reshape(batch.weights.shape)
    same = ~varied(rewards, batch.weights)
    metrics["zero_variance_fraction"] = masked_mean(same, (batch.weights > 0).any(1))
    if settings.kl_coeff:
        rewards = rewards - controllers["kl_coeff"] * penalty.charged.sum(-1).reshape(rewards.shape)
    return batch, rewards, metrics


def _trained_on(settings, batch):
    if not settings.mask_truncated:
        return batch
    return batch.replace(weights=batch.weights * batch.finished)


ROWS = {
    "rloo": Algorithm(RLOOSettings, rloo_objective, rloo_prepare, control_kl, teaches=teaches),
    "grpo": Algorithm(GRPOSettings, grpo_objective, grpo_prepare, control_kl, teaches=teaches),
}
