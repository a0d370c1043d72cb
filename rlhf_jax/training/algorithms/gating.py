"""The second part of a multi-objective reward model: a gate that weighs frozen aspects by the prompt, from pairs.

Wang et al. 2024 (ArmoRM), arXiv:2406.12845, section 2.2. Knows scores and pairs; no file or config object."""

import dataclasses

from rlhf_jax.models import roles
from rlhf_jax.training.algorithms.reward_models import RewardModelSettings, pair_losses
from rlhf_jax.training.algorithms.row import Algorithm
from rlhf_jax.training.algorithms.supervised import over_pairs


def whole(trained: dict, frozen: dict) -> roles.Role:
    """The reward model: frozen["aspects"] with the gate that is trained."""
    return frozen["aspects"].replace(gate=trained["reward"].gate)


def gating_objective(settings, network, trained, frozen, controllers, batch, rng):
    """Bradley-Terry on the gated scores. Only the gate is trained; completion 0 of each group was chosen."""
    scores = roles.scores(network.model, frozen["base"], whole(trained, frozen), batch)
    chosen, rejected = scores[:, 0], scores[:, 1]
    settings = dataclasses.replace(settings, center_coeff=0.0)  # no gate moves where aspects have their zero
    found = pair_losses(settings, chosen, rejected, batch.margins, batch.soft_labels)
    return over_pairs(batch, found, chosen, rejected, {})


GATING = Algorithm(RewardModelSettings, gating_objective, trains=("reward",))
