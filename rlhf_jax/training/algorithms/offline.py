"""Rows that learn from fixed completions: SFT, pairwise reward models, the DPO family."""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.losses import preference
from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.losses.reward_model import pairwise_logexp, pairwise_logsigmoid
from rlhf_jax.losses.supervised import completion_cross_entropy
from rlhf_jax.models import roles
from rlhf_jax.training.algorithms.row import Algorithm, Settings
from rlhf_jax.training.algorithms.shared import sequences, token_mask


@dataclasses.dataclass(frozen=True)
class SFTSettings(Settings):
    pass


def sft_objective(settings, network, trained, frozen, controllers, batch, rng):
    logprobs, entropy, _ = network.logprobs(frozen["base"], trained["policy"], batch)
    mask = token_mask(batch)
    loss = completion_cross_entropy(sequences(logprobs), mask)
    return loss, (mask.sum(), {"entropy": masked_mean(sequences(entropy), mask)})


@dataclasses.dataclass(frozen=True)
class RewardModelSettings(Settings):
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
    return _over_pairs(batch, losses, chosen, rejected, {})


@dataclasses.dataclass(frozen=True)
class DPOSettings(Settings):
    loss_type: str = "sigmoid"
    beta: float = 0.1  # reward units a nat
    label_smoothing: float = 0.0  # probability that a label is wrong
    discopop_tau: float = 0.05
    num_microbatches: int = 1

    def check(self) -> str | None:
        if self.loss_type not in preference.LOSSES:
            return f"loss_type is {self.loss_type!r}; expected one of {', '.join(preference.LOSSES)}."
        if self.num_microbatches > 1 and preference.LOSSES[self.loss_type].whole_batch:
            return f"num_microbatches is {self.num_microbatches}; loss_type {self.loss_type} sorts the whole batch: 1."
        if not 0 <= self.label_smoothing < 0.5:
            return f"label_smoothing is {self.label_smoothing}; expected 0 or more and below 0.5."
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            return "label_smoothing is 0, of which loss_type exo_pair takes the logarithm; 1e-3 is usual."
        return None


def dpo_objective(settings, network, trained, frozen, controllers, batch, rng):
    """Completion 0 of each group was chosen, 1 rejected; the reference is the base without an adapter."""
    logprobs, _, _ = network.logprobs(frozen["base"], trained["policy"], batch)
    reference, _, _ = network.logprobs(frozen["base"], roles.Role(), batch)
    mask = batch.completion_mask * batch.weights[..., None]
    of_completion = _mean if preference.LOSSES[settings.loss_type].averaged else _sum
    policy, reference = (of_completion(x, mask) for x in (logprobs, jax.lax.stop_gradient(reference)))
    losses, chosen, rejected = preference.preference_loss(
        policy[:, 0],
        policy[:, 1],
        reference[:, 0],
        reference[:, 1],
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        loss_type=settings.loss_type,
        discopop_tau=settings.discopop_tau,
    )
    more = {"chosen_logprob": policy[:, 0], "rejected_logprob": policy[:, 1]}
    return _over_pairs(batch, losses, chosen, rejected, more)


def _over_pairs(batch, losses, chosen, rejected, more):
    """(mean loss, (number of pairs, metrics)) over the pairs that count."""
    pairs = batch.weights.min(axis=1)
    metrics = {
        "accuracy": chosen > rejected,  # a tie counts as wrong
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    } | more
    metrics = {name: masked_mean(x.astype(jnp.float32), pairs) for name, x in metrics.items()}
    return masked_mean(losses, pairs), (pairs.sum(), metrics)


def _sum(logprobs, mask):
    return jnp.where(mask > 0, logprobs, 0.0).sum(-1)


def _mean(logprobs, mask):
    return masked_mean(logprobs, mask, axis=-1)


ROWS = {
    "sft": Algorithm(SFTSettings, sft_objective),
    "reward_model": Algorithm(RewardModelSettings, reward_model_objective, trains=("reward",)),
    "dpo": Algorithm(DPOSettings, dpo_objective),
}
