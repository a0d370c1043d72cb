"""A reward model of pairs, -log sigmoid(chosen - rejected), with a pull to mean 0 (and margins, where pairs are rated).

python -m experiments.run --config=configs/reward_models/pairwise.py:tiny --workdir=out
Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155; margin, Touvron et al. 2023 (Llama 2), arXiv:2307.09288, eq. 2."""

from configs import reward_model


def get_config(size="tiny"):
    return reward_model.get_config(size)
