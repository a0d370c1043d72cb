"""Ablations: short configs whose `points` are overrides of another config.   experiments/sweep.py runs them."""

import itertools

from ml_collections import config_dict

FIRST_STAGES = {
    "tiny": ("sft", "preferences", "reward_model", "gate")
}  # the self-made base has to be taught first


def sweep(size: str, *, points, base="configs/pipeline.py", seeds=(0, 1, 2), shared=None, overrides=()):
    """The config of a sweep; every key is here.

    Args:
      size: of every point, as after FILE.py: on the command line.
      points: a tuple; each KEY=VALUE, or a tuple of them, or dict(name=, config=, overrides=) with any of the three.
      base: config file of the points that name none, and of the shared stages.
      seeds: each point is run with each.
      shared: stages that no point changes, run once a seed and copied into each point; None: all before tuning. They
        take the lora section of the base: a point's own is that of its policy.
      overrides: of every point that has the section, before its own.
    """
    shared = FIRST_STAGES.get(size, ("preferences", "reward_model", "gate")) if shared is None else shared
    return config_dict.ConfigDict(
        dict(base=base, size=size, points=points, seeds=seeds, shared=shared, overrides=overrides)
    )


def grid(values: dict) -> tuple:
    """Points of every combination: grid({"ppo.kl_coeff": (0.1, 0.2), "lora.rank": (4, 16)}) has four."""
    pairs = [[f"{key}={value}" for value in several] for key, several in values.items()]
    return tuple(itertools.product(*pairs))
