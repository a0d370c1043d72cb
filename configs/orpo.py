"""ORPO: supervised fine-tuning and odds ratio in one loss, without a reference.

python -m experiments.run --config=configs/orpo.py:tiny --workdir=out
Hong et al. 2024, arXiv:2403.07691."""

from configs import common


def get_config(size="tiny"):
    return common.from_preferences(
        size,
        "orpo",
        loss_type="orpo",
        beta=0.1,  # the paper's lambda
        nll_coeff=1.0,  # of the chosen completion's negative log-likelihood, nats a token
        gamma=0.5,  # reward units, the margin that SimPO asks for
        shape_alpha=0.0,  # AlphaPO's; 0: none
        label_smoothing=0.0,  # probability that a label is wrong; cpo and simpo only
    )
