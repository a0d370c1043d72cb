"""A2C: PPO's critic without its clip, one update a rollout.   --config=configs/a2c.py:tiny

Mnih et al. 2016, arXiv:1602.01783; returns=n_step is the paper's; GAE at lambda 1 is Monte Carlo, at 0 one step."""

from configs import common


def get_config(size="tiny"):
    config = common.from_reward(
        size,
        "a2c",
        value="shared",  # whose states the value head reads: shared, own, reward (as in configs/common.py)
        gamma=1.0,
        returns="gae",  # or n_step
        gae_lambda=0.95,  # of gae
        n_step=5,  # tokens whose rewards are summed before the value takes over, of n_step
        value_coeff=0.1,
        whiten_rewards=False,  # without shifting their mean
        whiten_advantages=True,
    )
    config.a2c.update(rollout_epochs=1, num_minibatches=1)
    return config
