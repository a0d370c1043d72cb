"""A reward model of pairs in Anthropic's form, log(1 + exp(rejected - chosen)), and nothing beside it.

python -m experiments.run --config=configs/reward_models/pairwise_logexp.py:tiny --workdir=out
Bai et al. 2022, "Training a Helpful and Harmless Assistant", arXiv:2204.05862."""

from configs import reward_model


def get_config(size="tiny"):
    config = reward_model.get_config(size)
    config.reward_model.update(loss="logexp", center_coeff=0.0)
    return config
