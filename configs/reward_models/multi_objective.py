"""A reward model of several rated aspects, any of which may lack a rating; then a gate, trained on pairs, that weighs
the frozen aspects by the prompt, each freed of its correlation with length.

python -m experiments.run --config=configs/reward_models/multi_objective.py:tiny --workdir=out
Wang et al. 2024 (ArmoRM), arXiv:2406.12845."""

from configs import reward_model


def get_config(size="tiny"):
    config = reward_model.get_config(size)
    config.reward_model.kind = "multi_objective"
    return config
