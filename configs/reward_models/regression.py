"""A reward model of one rating a completion: squared error, or with reward_model.huber_delta above 0 Huber's loss.

python -m experiments.run --config=configs/reward_models/regression.py:tiny --workdir=out
Wang et al. 2023 (HelpSteer), arXiv:2311.09528; Huber 1964, "Robust Estimation of a Location Parameter"."""

from configs import reward_model


def get_config(size="tiny"):
    config = reward_model.get_config(size)
    config.reward_model.kind = "regression"
    return config
