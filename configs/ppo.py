"""PPO against a learned reward.   python -m experiments.run --config=configs/ppo.py:tiny --workdir=out

The same workdir may already hold a reward model (configs/reward_model.py); then only PPO is left to do."""

from configs import common


def get_config(size="tiny"):
    config = common.get_config(size)
    config.stages = (*common.first_stages(size), "reward_model", "gate", "ppo")
    return config
