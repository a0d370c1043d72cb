"""Online DPO: best and worst of G samples, by reward, are a preference.   --config=configs/online_dpo.py:tiny

Guo et al. 2024, arXiv:2402.04792; --config.online_dpo.loss_type=ipo, hinge, ... are rows of losses/preference.py."""

from configs import common


def get_config(size="tiny"):
    config = common.from_reward(
        size,
        "online_dpo",
        loss_type="sigmoid",  # several with commas are weighted and added
        loss_weights=(1.0,),  # one a loss
        beta=0.1,  # reward units a nat; larger stays closer to the reference
        label_smoothing=0.0,  # probability that the reward prefers the wrong one
        discopop_tau=0.05,  # of loss_type discopop
        f_divergence="reverse_kl",  # or forward_kl, js, alpha
        f_alpha=0.5,  # of f_divergence alpha
        tail_weight=1.0,  # LD-DPO: of tokens beyond the length of the pair's shorter completion; 1: as all others
    )
    config.online_dpo.update(
        kl_coeff=0.0,  # of the KL in the reward that ranks; beta has the like in the loss
        num_minibatches=1,
    )
    common.in_groups(config, "online_dpo", 4)
    return config
