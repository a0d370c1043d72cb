"""An ensemble of reward models of any kind (here of pairs), which differ in their seeds: head, adapter, order of the
data. What they disagree on is worth less: mean - spread_coeff * deviation, or the worst of them (combine=worst).

python -m experiments.run --config=configs/reward_models/ensemble.py:tiny --workdir=out
Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743."""

from configs import reward_model


def get_config(size="tiny"):
    config = reward_model.get_config(size)
    config.reward_model.members = 3
    return config
