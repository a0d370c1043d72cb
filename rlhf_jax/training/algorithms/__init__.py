"""The table of algorithms: how a batch gets its targets, the objective inside the gradient, the roles it trains.

An algorithm is a pure loss from losses/ plus the few lines here that feed it: supervised.py (SFT), reward_models.py
(each kind of them; gating.py: the second part of one; text_rewards.py: those that are no decoders), preference.py (DPO,
KTO, ORPO, CPO, SimPO), actor_critic.py (PPO, A2C), natural_gradient.py (TRPO), reinforce.py (REINFORCE and its
baselines), groups.py (RLOO, the GRPO family), selection.py (RAFT, online DPO, Quark). shared.py is what online rows
have in common, critic_free.py what those without a value role have, row.py what a row is. Knows no config object,
file or clock."""

from rlhf_jax.training.algorithms import (
    actor_critic,
    groups,
    natural_gradient,
    preference,
    reinforce,
    reward_models,
    selection,
    supervised,
)
from rlhf_jax.training.algorithms.row import Algorithm, Network

__all__ = ["ALGORITHMS", "Algorithm", "Network"]

ROOMS = (supervised, reward_models, preference, actor_critic, natural_gradient, reinforce, groups, selection)
ALGORITHMS: dict[str, Algorithm] = {name: row for room in ROOMS for name, row in room.ROWS.items()}
