"""TRPO: PPO's advantages, one natural-gradient step a rollout inside a hard KL limit.   --config=configs/trpo.py:tiny

Schulman et al. 2015, arXiv:1502.05477. config.trpo.optimizer is the value's; the policy has no learning rate."""

from configs import common


def get_config(size="tiny"):
    config = common.from_reward(
        size,
        "trpo",
        value="shared",  # whose states the value head reads: shared, own, reward (as in configs/common.py)
        gamma=1.0,
        gae_lambda=0.95,
        value_coeff=0.1,
        whiten_rewards=False,  # without shifting their mean
        whiten_advantages=True,
        max_kl_per_token=0.01,  # nats, mean over the tokens of a rollout, of KL(before || after) the step: never more
        cg_iterations=10,  # Fisher products a step, at most
        cg_tolerance=1e-3,  # residual at which they end, of the gradient's norm
        cg_damping=0.1,  # added to the Fisher matrix, of its curvature along the gradient
        backtrack_factor=0.8,  # of the step, from one candidate of the line search to the next
        backtrack_steps=10,  # candidates after the first; if none is good, the policy stays as it is
        accept_ratio=0.1,  # gain that a good candidate needs, of what the gradient promises
    )
    config.trpo.update(rollout_epochs=1, num_minibatches=1)
    return config
