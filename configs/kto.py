"""KTO: completions judged one by one, good or bad.   --config=configs/kto.py:tiny

Ethayarajh et al. 2024, arXiv:2402.01306. Data: rows with a `label`, true or false, or pairs, of which the
chosen one is good and the rejected one bad."""

from configs import common


def get_config(size="tiny"):
    return common.from_preferences(
        size,
        "kto",
        loss_type="kto",  # or apo_zero_unpaired
        beta=0.1,  # reward units a nat
        desirable_weight=1.0,  # so that weight * count of the good is 1 to 4/3 times that of the bad
        undesirable_weight=1.0,
        **common.REFERENCE,
    )
