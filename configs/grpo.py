"""GRPO and its family.   python -m experiments.run --config=configs/grpo.py:tiny --workdir=out

Shao et al. 2024, arXiv:2402.03300; --config.grpo.loss_type=dapo, dr_grpo, gspo, ... are the rows of losses/grpo.py."""

from configs import common


def get_config(size="tiny"):
    config = common.from_reward(
        size,
        "grpo",
        loss_type="grpo",
        # Deviation that advantages are divided by: group, batch, none. Several rewards, each normalised before they are
        # added (rewards.normalise=group), take batch here: GDPO, arXiv:2601.05242.
        advantage_scale="group",
        baseline="mean",  # of the group's rewards; or length_weighted: OPO, arXiv:2505.23585, with scale none
        top_entropy_quantile=1.0,  # fraction of tokens, of the highest entropy, that advantages reach; 1: all
        clip_low=0.2,  # the ratio is kept in [1 - clip_low, 1 + clip_high]; cispo: clip_high is the cap, 5.0 is usual
        clip_high=0.2,
        # Of the KL in the loss, nats a token. At 0.04, the paper's, smollm2 goes 17 nats away in 14 steps.
        kl_loss_coeff=0.15 if size == "smollm2" else 0.04,
        kl_loss_kind="k3",  # k1, k2, k3, k3+ (value of k3, gradient of k2), exact (over the whole vocabulary)
        **common.GROUPS,
    )
    config.grpo.kl_coeff = 0.0  # of the KL in the reward
    common.in_groups(config, "grpo", 4)
    return config
