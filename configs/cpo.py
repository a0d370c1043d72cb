"""CPO: DPO's loss without a reference, held up by the likelihood of the chosen.

python -m experiments.run --config=configs/cpo.py:tiny --workdir=out
Xu et al. 2024, arXiv:2401.08417; --config.cpo.loss_type=cpo_hinge, cpo_ipo."""

from configs import common


def get_config(size="tiny"):
    return common.from_preferences(
        size,
        "cpo",
        loss_type="cpo",
        beta=0.1,  # reward units a nat
        nll_coeff=1.0,  # of the chosen completion's negative log-likelihood, nats a token
        gamma=0.5,  # reward units, the margin that SimPO asks for
        shape_alpha=0.0,  # AlphaPO's; 0: none
        label_smoothing=0.0,  # probability that a label is wrong; cpo and simpo only
    )
