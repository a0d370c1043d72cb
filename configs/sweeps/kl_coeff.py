"""How far PPO should be let go: the price of KL.   python -m experiments.sweep --config=configs/sweeps/kl_coeff.py

Gao et al. 2022, arXiv:2210.10760, section 3.6: the penalty acts as early stopping, not as a better road."""

from configs.sweeps import grid, sweep


def get_config(size="tiny"):
    # None is 0: without a price the reference is never run, and KL not measured.
    prices = (0.001, 0.02, 0.1, 0.4) if size == "tiny" else (0.02, 0.1, 0.22, 0.5)
    return sweep(size, points=grid({"ppo.kl_coeff": prices}))
