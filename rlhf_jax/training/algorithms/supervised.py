"""Rows that learn from fixed completions: SFT and pairwise reward models."""

import dataclasses

import jax.numpy as jnp

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
    return over_pairs(batch, losses, chosen, rejected, {})


def over_pairs(batch, losses, chosen, rejected, more):
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


ROWS = {
    "sft": Algorithm(SFTSettings, sft_objective),
    "reward_model": Algorithm(RewardModelSettings, reward_model_objective, trains=("reward",)),
}
