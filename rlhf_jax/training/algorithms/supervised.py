"""The row that learns from completions to imitate, SFT, and the mean over pairs that other offline rows take."""

import dataclasses

import jax.numpy as jnp

from rlhf_jax.losses.masking import masked_mean
from rlhf_jax.losses.supervised import completion_cross_entropy
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


ROWS = {"sft": Algorithm(SFTSettings, sft_objective)}
