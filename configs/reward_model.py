"""A pairwise reward model.   python -m experiments.run --config=configs/reward_model.py:tiny --workdir=out

Data: --config.data.preferences=FILE; without one the preferences are sampled from the base and labelled by
`config.gold` through a Bradley-Terry coin (Gao et al. 2022, arXiv:2210.10760)."""

from configs import common


def get_config(size="tiny"):
    config = common.get_config(size)
    config.stages = (*common.first_stages(size), "reward_model")
    return config
