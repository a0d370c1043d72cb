"""The table of algorithms: how a batch gets its targets, the objective inside the gradient, the roles it trains.

An algorithm is a pure loss from losses/ plus the few lines here that feed it: supervised.py (SFT, reward models),
preference.py (DPO, KTO, ORPO, CPO, SimPO), actor_critic.py (PPO, A2C), critic_free.py (REINFORCE, RLOO, the GRPO
family), selection.py (RAFT, online DPO, Quark); shared.py is what online rows have in common, row.py what a row is.
Knows no config object, file or clock."""

from rlhf_jax.training.algorithms import actor_critic, critic_free, preference, selection, supervised
from rlhf_jax.training.algorithms.row import Algorithm, Network

__all__ = ["ALGORITHMS", "Algorithm", "Network"]

ALGORITHMS: dict[str, Algorithm] = (
    supervised.ROWS | preference.ROWS | actor_critic.ROWS | critic_free.ROWS | selection.ROWS
)
