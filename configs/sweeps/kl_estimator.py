"""Which estimate of KL to subtract from the reward.   --config=configs/sweeps/kl_estimator.py

Schulman, "Approximating KL divergence" (2020): k1 is unbiased, k2 biased, k3 unbiased and never negative.
As rewards k2 and k3 lose the gradient of KL; exact (losses/full_kl.py) keeps it and has no noise of the token drawn."""

from configs.sweeps import grid, sweep


def get_config(size="tiny"):
    return sweep(size, points=grid({"ppo.kl_kind": ("k1", "k2", "k3", "exact")}))
