"""REINFORCE++: returns whitened over the whole batch, PPO's clip, no critic.   --config=configs/reinforce_pp.py:tiny

Hu et al. 2025, arXiv:2501.03262."""

from configs import common


def get_config(size="tiny"):
    return common.from_reward(size, "reinforce_pp", gamma=1.0, clip_epsilon=0.2)
