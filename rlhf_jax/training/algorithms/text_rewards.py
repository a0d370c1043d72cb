"""Reward models that are no decoders, one row each: an encoder, PairRM, SteamSHP. What of a record they read, and their
objective.

The network and its input are those of rewards/models, so training and scoring read the same. Knows scores; which
checkpoint they come from is text_reward_stage.py's. Sources: BERT's classifier, Devlin et al. 2019, arXiv:1810.04805;
PairRM, Jiang et al. 2023, arXiv:2306.02561, eq. 3; SteamSHP, Ethayarajh et al. 2022, arXiv:2110.08420."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from rlhf_jax.rewards.models.encoder import Sequence, reward_of
from rlhf_jax.rewards.models.pairrm import Comparison
from rlhf_jax.rewards.models.steamshp import Question
from rlhf_jax.training.algorithms.reward_models import of_labels, of_ratings, pair_losses
from rlhf_jax.training.algorithms.supervised import over_pairs


@dataclasses.dataclass(frozen=True)
class TextKind:
    """One row. `network` below is an object of it, in the place of the decoder's Network."""

    network: Callable  # (config of the checkpoint, its SequenceTokenizer) -> input(...), and what the objective calls
    inputs: Callable  # (network, prompt, completions) -> [(ids, type ids)], the G sequences of a record
    objective: Callable  # as an Algorithm's
    scores: Callable  # (network, role, SequenceBatch) -> [B, G] scores of the completions, as its TextReward gives them


def flat(batch):
    """(ids, mask, type ids), each [B * G, T]."""
    return [x.reshape(-1, x.shape[-1]) for x in (batch.ids, batch.mask, batch.type_ids)]


# An encoder: one sequence a completion


def each_alone(network, prompt, completions):
    return [network.input(prompt, text) for text in completions]


def encoder_outputs(network, role, batch):
    """[B, G, K]"""
    return network.logits(role.base, role.head, *flat(batch)).reshape(*batch.weights.shape, -1)


def encoder_objective(settings, network, trained, frozen, controllers, batch, rng):
    outputs = encoder_outputs(network, trained["reward"], batch)
    scores = reward_of(outputs)
    if settings.objective == "classification":
        return of_labels(settings, batch, scores, outputs)
    if settings.objective == "regression":
        return of_ratings(settings, batch, scores)
    chosen, rejected = scores[:, 0], scores[:, 1]
    found = pair_losses(settings, chosen, rejected, batch.margins, batch.soft_labels)
    return over_pairs(batch, found, chosen, rejected, {})


# Two completions in one sequence: the better first, then in the other order


def both_orders(network, prompt, completions):
    better, worse = completions
    return [network.input(prompt, better, worse), network.input(prompt, worse, better)]


def advantages(network, role, batch):
    """[B, 2]: how much better the better completion is, by each order."""
    found = network.advantage(role.base, role.head, *flat(batch)).reshape(batch.weights.shape)
    return found * jnp.array([[1.0, -1.0]])


def of_advantage(advantage):
    """[B] -> [B, 2] scores of the better and the worse, as a tournament of the two gives them."""
    return jnp.stack([advantage, -advantage], axis=1)


def pairrm_objective(settings, network, trained, frozen, controllers, batch, rng):
    """-log sigmoid of the better candidate's advantage, as the mean of both orders."""
    found = advantages(network, trained["reward"], batch)
    loss = lambda x: pair_losses(settings, x / 2, -x / 2, batch.margins, batch.soft_labels)
    losses = (loss(found[:, 0]) + loss(found[:, 1])) / 2
    chosen, rejected = of_advantage(found.mean(1)).T
    return over_pairs(batch, losses, chosen, rejected, {})


def letters(network, role, batch):
    """[B, 2, 2] nats: log-probability of the letter of the better completion, and of the worse, by each order."""
    found = network.answers(role.base, *flat(batch)).reshape(*batch.weights.shape, 2)
    return jnp.stack([found[:, 0], found[:, 1, ::-1]], axis=1)


def of_letters(found):
    """[B, 2] probabilities of being the better one, both orders averaged."""
    better = (1.0 / (1.0 + jnp.exp(found[..., 1] - found[..., 0]))).mean(1)
    return jnp.stack([better, 1.0 - better], axis=1)


def steamshp_objective(settings, network, trained, frozen, controllers, batch, rng):
    """Cross-entropy of the better one's letter, among all tokens, at the first decoder step; mean of both orders."""
    found = letters(network, trained["reward"], batch)
    loss = -found[..., 0].mean(1)
    if batch.soft_labels is not None:
        loss = batch.soft_labels * loss - (1.0 - batch.soft_labels) * found[..., 1].mean(1)
    chosen, rejected = of_letters(found).T
    return over_pairs(batch, loss, chosen, rejected, {"answered": jnp.exp(found).sum(-1).mean(1)})


TEXT_KINDS = {
    "encoder": TextKind(
        Sequence,
        each_alone,
        encoder_objective,
        lambda network, role, batch: reward_of(encoder_outputs(network, role, batch)),
    ),
    "pairrm": TextKind(
        Comparison,
        both_orders,
        pairrm_objective,
        lambda network, role, batch: of_advantage(advantages(network, role, batch).mean(1)),
    ),
    "steamshp": TextKind(
        Question,
        both_orders,
        steamshp_objective,
        lambda network, role, batch: of_letters(letters(network, role, batch)),
    ),
}
