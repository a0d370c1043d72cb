"""SimPO: mean log-probabilities and a margin, without a reference; AlphaPO by shape_alpha.

python -m experiments.run --config=configs/simpo.py:tiny --workdir=out
Meng et al. 2024, arXiv:2405.14734."""

from configs import common


def get_config(size="tiny"):
    return common.from_preferences(
        size,
        "simpo",
        loss_type="simpo",
        beta=2.0,  # reward units a nat
        nll_coeff=0.0,  # of the chosen completion's negative log-likelihood, nats a token
        gamma=0.5,  # reward units, the margin that SimPO asks for
        shape_alpha=0.0,  # AlphaPO's; 0: none
        label_smoothing=0.0,  # probability that a label is wrong; cpo and simpo only
    )
