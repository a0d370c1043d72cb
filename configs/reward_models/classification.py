"""A reward model of completions that were each accepted or not: two classes, the reward the logit of the first (or its
probability, reward_model.classification_reward=probability).

python -m experiments.run --config=configs/reward_models/classification.py:tiny --workdir=out
Cross-entropy on outcomes: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168."""

from configs import reward_model


def get_config(size="tiny"):
    config = reward_model.get_config(size)
    config.reward_model.kind = "classification"
    return config
