"""Algorithms on one reward model and one set of preferences.   --config=configs/sweeps/losses.py

Each as its own config has it: what is compared are whole recipes. DPO samples nothing, so it has no curve over KL."""

from configs.sweeps import sweep


def get_config(size="tiny"):
    points = (
        dict(name="ppo"),
        dict(name="grpo", config="configs/grpo.py"),
        dict(name="rloo", config="configs/rloo.py"),
        dict(name="reinforce_pp", config="configs/reinforce_pp.py"),
        dict(name="dpo", config="configs/dpo.py"),
    )
    return sweep(size, points=points)
