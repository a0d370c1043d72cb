"""REINFORCE with a running baseline.   python -m experiments.run --config=configs/reinforce.py:tiny --workdir=out

Williams 1992. One update a rollout: nothing bounds the ratio."""

from configs import common


def get_config(size="tiny"):
    config = common.from_reward(
        size,
        "reinforce",
        gamma=1.0,
        baseline="running",  # mean return of the steps before; or none
        whiten_advantages=False,
    )
    config.reinforce.update(rollout_epochs=1, num_minibatches=1)
    return config
