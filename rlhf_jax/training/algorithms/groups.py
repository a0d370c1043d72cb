"""RLOO and the GRPO family: a completion is worth what it is better than the others of its group."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.losses import grpo, kl
from rlhf_jax.losses.advantages import group_relative, leave_one_out
from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.losses.policy_gradient import policy_gradient_loss
from rlhf_jax.training.algorithms.critic_free import finished, policy, with_advantages
from rlhf_jax.training.algorithms.row import Algorithm
from rlhf_jax.training.algorithms.shared import OnlineSettings, kl_control, scored, sequences


@dataclasses.dataclass(frozen=True)
class RLOOSettings(OnlineSettings):
    """Ahmadian et al. 2024, arXiv:2402.14740: one action a completion, KL in its reward, the others as baseline."""

    ratio_clip: float = 0.0  # half-width of the interval around a completion's ratio of 1; 0: none


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
    kl_loss_kind: str = "k3"  # k1, k2, k3, or k3+: value of k3, gradient of k2

    @property
    def reads_reference(self) -> bool:
        return bool(self.kl_coeff or self.kl_loss_coeff)

    def check(self) -> str | None:
        for name, value, known in (
            ("loss_type", self.loss_type, grpo.LOSSES),
            ("kl_loss_kind", self.kl_loss_kind, grpo.KL_KINDS),
            ("advantage_scale", self.advantage_scale, ("group", "batch", "none")),
        ):
            if value not in known:
                return f"{name} is {value!r}; expected one of {', '.join(known)}."
        return None


def rloo_prepare(settings, network, frozen, controllers, batch):
    batch, rewards, metrics = _group_rewards(settings, network, frozen, controllers, batch)
    return with_advantages(batch, leave_one_out(rewards, batch.weights)), metrics


def grpo_prepare(settings, network, frozen, controllers, batch):
    batch, rewards, metrics = _group_rewards(settings, network, frozen, controllers, batch)
    advantages = group_relative(rewards, settings.advantage_scale, weights=batch.weights)
    return with_advantages(batch, advantages), metrics


def rloo_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, old, mask, entropy = policy(network, trained, frozen, batch)
    advantages = batch.advantages[..., 0].reshape(-1)
    clip = settings.ratio_clip or None
    loss, metrics = policy_gradient_loss(logprobs, old, advantages, mask, "sequence", clip)
    return finished(settings, loss, metrics, entropy, mask, (mask > 0).any(-1).sum())


def grpo_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, old, mask, entropy = policy(network, trained, frozen, batch)
    reference = sequences(batch.ref_logprobs) if settings.kl_loss_coeff else None
    loss, metrics = grpo.grpo_loss(
        logprobs,
        old,
        reference,
        batch.advantages[..., 0].reshape(-1),
        mask,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        beta=settings.kl_loss_coeff,
        kl_kind=settings.kl_loss_kind,
        loss_type=settings.loss_type,
        max_length=mask.shape[-1],
    )
    # `kl` is the rollout's, before any update.
    if reference is not None:
        metrics["kl_loss"] = metrics.pop("kl")
    gap = jax.lax.stop_gradient(jnp.where(mask > 0, logprobs - old, 0.0))
    metrics["ratio_max_gap"] = jnp.abs(jnp.expm1(gap)).max()
    by_token = settings.loss_type in ("bnpo", "dapo", "cispo")
    return finished(settings, loss, metrics, entropy, mask, None if by_token else mask.shape[0])


def _group_rewards(settings, network, frozen, controllers, batch):
    """(batch, scores less KL of the whole completion [B, G], metrics)."""
    batch, scores, metrics = scored(settings, network, frozen, controllers, batch)
    rewards = scores.reshape(batch.weights.shape)
    counts = batch.weights > 0
    highest = jnp.where(counts, rewards, -jnp.inf).max(1)
    lowest = jnp.where(counts, rewards, jnp.inf).min(1)
    metrics["zero_variance_fraction"] = masked_mean((highest <= lowest).astype(jnp.float32), counts.any(1))
    if settings.kl_coeff:
        log_ratio = kl.kl_estimate(batch.old_logprobs, batch.ref_logprobs, kind=settings.kl_kind)
        distance = jnp.where(batch.completion_mask > 0, log_ratio, 0.0).sum(-1)
        rewards = rewards - controllers["kl_coeff"] * distance
    return batch, rewards, metrics


ROWS = {
    "rloo": Algorithm(RLOOSettings, rloo_objective, rloo_prepare, kl_control),
    "grpo": Algorithm(GRPOSettings, grpo_objective, grpo_prepare, kl_control),
}
