"""ReMax: REINFORCE less the reward of the greedy completion.   --config=configs/remax.py:tiny

Li et al. 2023, arXiv:2310.10505. No critic and no group: one more completion a prompt, not trained on."""

from configs import common


def get_config(size="tiny"):
    config = common.from_reward(size, "remax", gamma=1.0)
    config.remax.update(rollout_epochs=1, num_minibatches=1)
    return config
