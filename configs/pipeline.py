"""The whole road: preferences, reward model, PPO, evaluation and report.   make demo runs this at size smollm2.

python -m experiments.run --config=configs/pipeline.py:smollm2 --workdir=runs/demo"""

from configs import ppo


def get_config(size="tiny"):
    config = ppo.get_config(size)
    config.stages = (*config.stages, "evaluation")
    return config
