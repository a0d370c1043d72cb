"""Rows with a value role: PPO, PPO-ptx and A2C. One way from a rollout to advantages, two policy losses."""

import dataclasses

from rlhf_jax.losses.advantages import gae, n_step_returns, rewards_less_kl
from rlhf_jax.losses.masking import masked_mean, masked_whiten
from rlhf_jax.losses.policy_gradient import policy_gradient_loss
from rlhf_jax.losses.ppo import VALUE_LOSSES, clipped_policy_loss, value_loss
from rlhf_jax.losses.supervised import completion_cross_entropy
from rlhf_jax.models import heads, roles
from rlhf_jax.training.algorithms.row import Algorithm
from rlhf_jax.training.algorithms.shared import (
    OnlineSettings,
    control_kl,
    scored,
    sequences,
    token_mask,
    with_entropy,
)


@dataclasses.dataclass(frozen=True)
class CriticSettings(OnlineSettings):
    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_coeff: float = 0.1
    whiten_rewards: bool = False  # without shifting the mean
    whiten_advantages: bool = True

    def estimate(self, rewards, values, mask):
        """(advantages, returns), [N, R] each."""
        return gae(rewards, values, mask, self.gamma, self.gae_lambda)


@dataclasses.dataclass(frozen=True)
class A2CSettings(CriticSettings):
    """Mnih et al. 2016, arXiv:1602.01783, in one synchronous batch."""

    returns: str = "gae"  # or n_step, as in the paper
    n_step: int = 5  # tokens, of n_step

    def check(self) -> str | None:
        if self.returns not in ("gae", "n_step"):
            return f"returns is {self.returns!r}; expected one of gae, n_step."
        return super().check()

    def estimate(self, rewards, values, mask):
        if self.returns == "n_step":
            return n_step_returns(rewards, values, mask, self.n_step, self.gamma)
        return super().estimate(rewards, values, mask)


@dataclasses.dataclass(frozen=True)
class PPOSettings(CriticSettings):
    """Schulman et al. 2017, arXiv:1707.06347."""

    clip_epsilon: float = 0.2
    clip_epsilon_high: float = 0.0  # half-width above a ratio of 1; 0: clip_epsilon, as below it
    dual_clip: float = 0.0  # cap on the ratio where the advantage is negative; 0: none
    value_loss: str = "clipped"  # around the old values; or squared, huber
    value_clip: float = 0.2  # reward units; of huber, the error at which it turns linear

    def check(self) -> str | None:
        if self.value_loss not in VALUE_LOSSES:
            return f"value_loss is {self.value_loss!r}; expected one of {', '.join(VALUE_LOSSES)}."
        return super().check()


@dataclasses.dataclass(frozen=True)
class PPOPtxSettings(PPOSettings):
    """Ouyang et al. 2022, arXiv:2203.02155, eq. 2: the gradient of a supervised loss, on data of its own, is added."""

    ptx_coeff: float = 27.8  # reward units a nat of the examples' cross-entropy a token
    ptx_batch_size: int = 16  # examples an update
    num_microbatches: int = 1

    def check(self) -> str | None:
        if self.ptx_batch_size % self.num_microbatches:
            return (
                f"ptx_batch_size is {self.ptx_batch_size}; expected a multiple of num_microbatches, "
                f"{self.num_microbatches}."
            )
        return super().check()


def prepare(settings, network, frozen, controllers, batch):
    """Scores, KL to the reference, shaped rewards, advantages and returns of one rollout, over the whole batch."""
    batch, scores, penalty, metrics = scored(settings, network, frozen, controllers, batch)
    mask = token_mask(batch)
    rewards = rewards_less_kl(scores, penalty.charged, mask, controllers["kl_coeff"])
    if settings.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    values = sequences(batch.old_values)
    advantages, returns = settings.estimate(rewards, values, mask)
    if penalty.own is not None:
        advantages = advantages - controllers["kl_coeff"] * penalty.own
    if settings.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    like = lambda x: x.reshape(batch.completion_mask.shape)
    return batch.replace(advantages=like(advantages), returns=like(returns)), metrics


def ppo_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, entropy, states = network.logprobs(frozen["base"], trained["policy"], batch)
    mask = token_mask(batch)
    policy_loss, metrics = clipped_policy_loss(
        sequences(logprobs),
        sequences(batch.old_logprobs),
        sequences(batch.advantages),
        mask,
        (settings.clip_epsilon, settings.clip_epsilon_high or settings.clip_epsilon),
        dual_clip=settings.dual_clip or None,
    )
    values = (settings.value_loss, settings.value_clip)
    return with_value(
        settings, network, trained, frozen, batch, states, entropy, policy_loss, metrics, values
    )


def ptx_objective(settings, network, trained, frozen, controllers, batch, rng):
    """Cross-entropy of the policy on examples that have nothing to do with the rollout."""
    logprobs, _, _ = network.logprobs(frozen["base"], trained["policy"], batch)
    mask = token_mask(batch)
    loss = completion_cross_entropy(sequences(logprobs), mask)
    return settings.ptx_coeff * loss, (mask.sum(), {"ptx_loss": loss})


def a2c_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, entropy, states = network.logprobs(frozen["base"], trained["policy"], batch)
    mask = token_mask(batch)
    policy_loss, metrics = policy_gradient_loss(
        sequences(logprobs), sequences(batch.old_logprobs), sequences(batch.advantages), mask
    )
    values = ("squared", 0.0)
    return with_value(
        settings, network, trained, frozen, batch, states, entropy, policy_loss, metrics, values
    )


def with_value(settings, network, trained, frozen, batch, states, entropy, policy_loss, metrics, kind):
    """The policy's loss with those of value (kind: name and limit) and entropy."""
    if not trained["value"].is_head_only:
        states = roles.predicting_states(network.model, frozen["base"], trained["value"], batch)
    values, mask = heads.apply(trained["value"].head, states), token_mask(batch)
    of_values, value_metrics = value_loss(
        sequences(values), sequences(batch.old_values), sequences(batch.returns), mask, *kind
    )
    mean_entropy = masked_mean(sequences(entropy), mask)
    loss = with_entropy(settings, policy_loss + settings.value_coeff * of_values, mean_entropy)
    metrics = metrics | value_metrics | {"policy_loss": policy_loss, "entropy": mean_entropy}
    metrics["value_loss"] = of_values
    # Before the first update the policy is the one that sampled: this is 0 but for rounding, or something is wrong.
    metrics["first_ratio_gap"] = metrics.pop("ratio_max_gap")
    return loss, (mask.sum(), metrics)


ROWS = {
    "a2c": Algorithm(A2CSettings, a2c_objective, prepare, control_kl, trains=("policy", "value")),
    "ppo": Algorithm(PPOSettings, ppo_objective, prepare, control_kl, trains=("policy", "value")),
    "ppo_ptx": Algorithm(
        PPOPtxSettings,
        ppo_objective,
        prepare,
        control_kl,
        auxiliary_objective=ptx_objective,
        trains=("policy", "value"),
    ),
}
