"""DPO and its family on preferences alone.   python -m experiments.run --config=configs/dpo.py:tiny --workdir=out

Rafailov et al. 2023, arXiv:2305.18290; --config.dpo.loss_type=ipo, hinge, ... are the rows of losses/preference.py."""

from configs import common


def get_config(size="tiny"):
    config = common.from_preferences(
        size,
        "dpo",
        loss_type="sigmoid",
        beta=0.1,  # reward units a nat; larger stays closer to the reference
        label_smoothing=0.0,  # probability that a label is wrong
        discopop_tau=0.05,  # of loss_type discopop
    )
    # A tenth of a reward model's rate: at more the policy leaves the reference without getting better.
    config.dpo.optimizer.learning_rate *= 0.1
    return config
