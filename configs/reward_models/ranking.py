"""A reward model of rankings of K completions, in one forward pass of the group: Plackett-Luce, or with
reward_model.ranking_loss=pairs all pairs that a ranking has.

python -m experiments.run --config=configs/reward_models/ranking.py:tiny --workdir=out
Plackett 1975; all pairs, Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, eq. 1."""

from configs import reward_model


def get_config(size="tiny"):
    config = reward_model.get_config(size)
    config.reward_model.kind = "ranking"
    return config
