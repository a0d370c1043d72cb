"""A reward model with a value at every token: pairs are compared from their first different token to the end of the
longer one, and the value of the last real token is the score.

python -m experiments.run --config=configs/reward_models/token_level.py:tiny --workdir=out
Yao et al. 2023 (DeepSpeed-Chat), arXiv:2308.01320."""

from configs import reward_model


def get_config(size="tiny"):
    config = reward_model.get_config(size)
    config.reward_model.update(kind="token_level", pooling="last")
    if size == "tiny":  # most tokens that are compared come before the word that decides
        config.reward_model.steps *= 3
    return config
