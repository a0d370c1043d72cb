"""RLOO: a completion's baseline is the mean reward of the others.   --config=configs/rloo.py:tiny

Ahmadian et al. 2024, arXiv:2402.14740."""

from configs import common


def get_config(size="tiny"):
    config = common.from_reward(
        size,
        "rloo",
        ratio_clip=0.2,  # half-width of the interval around a completion's ratio of 1; 0: none
        whiten_advantages=False,
        **common.GROUPS,
    )
    common.in_groups(config, "rloo", 4)
    return config
