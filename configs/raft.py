"""RAFT: imitate the best of G samples, again and again.   --config=configs/raft.py:tiny

Dong et al. 2023, arXiv:2304.06767; the rejection sampling of Llama 2 (arXiv:2307.09288)."""

from configs import common


def get_config(size="tiny"):
    config = common.from_reward(
        size,
        "raft",
        keep=1,  # of a prompt's completions, the best by reward
    )
    config.raft.update(
        kl_coeff=0.0,  # of the KL in the reward that ranks
        rollout_epochs=1,  # more, and the few that were kept are learnt by heart
        num_minibatches=1,
    )
    common.in_groups(config, "raft", 8)
    return config
