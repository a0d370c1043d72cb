"""How many directions the policy needs; its reward model stays the base's.   --config=configs/sweeps/lora_rank.py

Hu et al. 2021, arXiv:2106.09685, section 7.2. alpha follows the rank, so that the scale alpha / rank stays 2."""

from configs.sweeps import sweep


def get_config(size="tiny"):
    ranks = (1, 4, 16, 64)
    points = tuple(
        dict(name=f"rank={rank}", overrides=(f"lora.rank={rank}", f"lora.alpha={2 * rank}")) for rank in ranks
    )
    return sweep(size, points=points)
