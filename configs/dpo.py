"""DPO and its family on preferences alone.   python -m experiments.run --config=configs/dpo.py:tiny --workdir=out

Rafailov et al. 2023, arXiv:2305.18290; --config.dpo.loss_type=ipo, hinge, ... are the rows of losses/preference.py.
MPO: --config.dpo.loss_type=sigmoid,bco_pair,sft --config.dpo.loss_weights='(0.8,0.2,1.0)'"""

from configs import common


def get_config(size="tiny"):
    return common.from_preferences(
        size,
        "dpo",
        loss_type="sigmoid",  # several with commas are weighted and added
        loss_weights=(1.0,),  # one a loss
        beta=0.1,  # reward units a nat; larger stays closer to the reference
        label_smoothing=0.0,  # probability that a label is wrong; in sigmoid, 1 - soft_label of a pair that has one
        discopop_tau=0.05,  # of loss_type discopop
        f_divergence="reverse_kl",  # or forward_kl, js, alpha (Wang et al. 2023, arXiv:2309.16240)
        f_alpha=0.5,  # of f_divergence alpha
        tail_weight=1.0,  # LD-DPO: of tokens beyond the length of the pair's shorter completion; 1: as all others
        wpo=False,  # weigh each pair by how likely the policy would write it (Zhou et al. 2024, arXiv:2406.11827)
        **common.REFERENCE,
    )
