"""Best-of-n of the base by a learned reward: no policy is trained.   --config=configs/best_of_n.py:tiny

What a tuned policy has to beat at the same KL (Stiennon et al. 2020, arXiv:2009.01325; Gao et al. 2022,
arXiv:2210.10760). evaluation.json has the curve over n under best_of."""

from configs import common


def get_config(size="tiny"):
    config = common.get_config(size)
    del config.ppo, config.logging.tags.ppo
    config.stages = (*common.first_stages(size), "reward_model", "evaluation")
    config.evaluation.best_of = 16
    return config
