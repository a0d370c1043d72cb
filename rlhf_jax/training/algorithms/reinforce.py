"""REINFORCE, REINFORCE++ and ReMax: each token is worth the rewards that follow it. What differs is the baseline."""

import dataclasses

import jax.numpy as jnp

from rlhf_jax.losses.advantages import discounted_returns, rewards_less_kl
from rlhf_jax.losses.masking import masked_mean, masked_whiten
from rlhf_jax.losses.policy_gradient import policy_gradient_loss
from rlhf_jax.losses.ppo import clipped_policy_loss
from rlhf_jax.training.algorithms.critic_free import finished, policy, with_advantages
from rlhf_jax.training.algorithms.row import Algorithm
from rlhf_jax.training.algorithms.shared import (
    OnlineSettings,
    control_kl,
    ruled_scores,
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
class ReMaxSettings(OnlineSettings):
    """Li et al. 2023, arXiv:2310.10505: returns less the score of the greedy completion of the same prompt.

    As in verl, the KL is in the rewards of the tokens and the baseline is the bare score, after the rules for a missing
    end, the clip and the length: it does not depend on what was sampled, so it changes no expectation.
    """

    gamma: float = 1.0


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
    return with_advantages(batch, advantages), metrics


def reinforce_control(settings, controllers, metrics, num_sequences):
    controllers = control_kl(settings, controllers, metrics, num_sequences)
    mean = BASELINE_DECAY * controllers["baseline"] + (1 - BASELINE_DECAY) * metrics["return"]
    return controllers | {"baseline": mean}


def reinforce_pp_prepare(settings, network, frozen, controllers, batch):
    batch, returns, mask, metrics = _returns(settings, network, frozen, controllers, batch)
    return with_advantages(batch, masked_whiten(returns, mask)), metrics


def remax_prepare(settings, network, frozen, controllers, batch):
    batch, returns, mask, metrics = _returns(settings, network, frozen, controllers, batch)
    baseline = jnp.broadcast_to(ruled_scores(settings, batch.greedy), batch.weights.shape).reshape(-1)
    metrics["baseline"] = masked_mean(baseline, batch.weights.reshape(-1))
    advantages = jnp.where(mask > 0, returns - baseline[:, None], 0.0)
    return with_advantages(batch.replace(greedy=None), advantages), metrics


def reinforce_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, old, mask, entropy = policy(network, trained, frozen, batch)
    loss, metrics = policy_gradient_loss(logprobs, old, sequences(batch.advantages), mask)
    return finished(settings, loss, metrics, entropy, mask)


def reinforce_pp_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, old, mask, entropy = policy(network, trained, frozen, batch)
    advantages = sequences(batch.advantages)
    loss, metrics = clipped_policy_loss(logprobs, old, advantages, mask, settings.clip_epsilon)
    return finished(settings, loss, metrics, entropy, mask)


def _returns(settings, network, frozen, controllers, batch):
    """(batch, returns-to-go [N, R] of scores less KL, mask, metrics)."""
    batch, scores, penalty, metrics = scored(settings, network, frozen, controllers, batch)
    mask = token_mask(batch)
    rewards = rewards_less_kl(scores, penalty.charged, mask, controllers["kl_coeff"])
    returns = discounted_returns(rewards, mask, settings.gamma)
    if penalty.own is not None:
        returns = returns - controllers["kl_coeff"] * penalty.own
    return batch, returns, mask, metrics


ROWS = {
    "reinforce": Algorithm(
        ReinforceSettings,
        reinforce_objective,
        reinforce_prepare,
        reinforce_control,
        controllers=("baseline",),
    ),
    "reinforce_pp": Algorithm(ReinforcePPSettings, reinforce_pp_objective, reinforce_pp_prepare, control_kl),
    "remax": Algorithm(ReMaxSettings, reinforce_objective, remax_prepare, control_kl, greedy_baseline=True),
}
